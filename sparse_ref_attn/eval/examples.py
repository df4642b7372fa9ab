"""What a data set is made of: examples, opened when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..vocabulary import OPEN_SCENERY, chosen

if TYPE_CHECKING:
    from ..toy.scenes import Scene

__all__ = ["FAMILIES", "Example", "Examples", "of_scene", "procedural"]

FAMILIES = {
    "subject-driven": ("place", "pair"), "aligned": ("swap", "local", "global"), OPEN_SCENERY: ("open", "open-pair"),
}  # fmt: skip
"""The tasks of ``sparse_ref_attn.toy``, in three families; those of the last have many right answers each."""

Mask = NDArray[np.floating[Any]]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""


@dataclass(frozen=True)
class Example:
    """References, what is asked for, and, where it is known, the answer.

    Parameters
    ----------
    id, family : str
        Of this example, and of the kind it belongs to.
    references : tuple of PIL.Image.Image
    prompt : str
    target : PIL.Image.Image or ndarray, optional
        The answer; an array is (H, W, 3), 0 to 1.
    mask : ndarray, optional
        (H, W), 0 to 1, of the answer: its subject, or the part that is edited.
    reference_masks : tuple of ndarray, optional
        (H, W), 0 to 1, one for each reference.
    boxes : tuple of (int, int, int, int), optional
        Left, top, right and bottom of each subject in the answer, in pixels; default one box around what `mask` marks.
    open_scenery : bool
        Whether `target` is one right answer of many, which have only the subject in common: what is behind it is any of
        the textures of ``sparse_ref_attn.toy``.
    """

    id: str
    family: str
    references: tuple[Any, ...]
    prompt: str
    target: Any = None
    mask: Mask | None = None
    reference_masks: tuple[Mask, ...] | None = None
    boxes: tuple[Box, ...] | None = None
    open_scenery: bool = False


class Examples(Sequence[Example]):
    """A data set.

    Parameters
    ----------
    about : dict
        JSON types that tell this data set from others.
    keys : sequence of (str, str)
        Id and family of each example, all ids different.
    open : callable of int
        Opens one.
    targets, masks, reference_masks, open_scenery : bool
        Whether any example has them.
    """

    def __init__(
        self,
        about: dict[str, Any],
        keys: Sequence[tuple[str, str]],
        open: Callable[[int], Example],
        *,
        targets: bool = False,
        masks: bool = False,
        reference_masks: bool = False,
        open_scenery: bool = False,
    ) -> None:
        self.about, self.keys, self._open = about, tuple(keys), open
        self.targets, self.masks, self.reference_masks = targets, masks, reference_masks
        self.open_scenery = open_scenery
        ids = [key[0] for key in keys]
        twice = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
        if twice:
            raise ConfigError(f"the ids of examples must differ, got {', '.join(twice[:5])} more than once")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        return self._open(range(len(self))[index])

    @property
    def families(self) -> tuple[str, ...]:
        """In the order in which they first come."""
        return tuple(dict.fromkeys(family for _, family in self.keys))

    def chosen(self, families: Sequence[str] | None = None, count: int | None = None) -> list[int]:
        """Indices of the first `count` examples of each of `families`, default all.

        Raises
        ------
        ConfigError
            For a family that is not there, or one with fewer examples.
        """
        families = self.families if families is None else families
        unknown = [family for family in families if family not in self.families]
        if unknown:
            raise ConfigError(f"families must be among {', '.join(self.families)}, got {', '.join(unknown)}")
        found: dict[str, list[int]] = {family: [] for family in families}
        for index, (_, family) in enumerate(self.keys):
            if family in found and (count is None or len(found[family]) < count):
                found[family].append(index)
        for family, indices in found.items():
            if count is not None and len(indices) < count:
                raise ConfigError(f"{family} must have {count} examples, got {len(indices)}")
        return sorted(index for indices in found.values() for index in indices)


def of_scene(id: str, family: str, scene: Scene) -> Example:
    """A pair of the procedural task as an example."""
    from ..toy.calls import image

    references = tuple(image(picture) for picture in scene.references)
    return Example(
        id, family, references, scene.prompt, image(scene.target), scene.mask, scene.masks,
        open_scenery=scene.task in FAMILIES[OPEN_SCENERY],
    )  # fmt: skip


def procedural(
    sprites: str | None = None,
    *,
    side: int = 128,
    seed: int = 0,
    families: Sequence[str] = ("subject-driven", "aligned"),
) -> Examples:
    """The procedural task on held-out subjects and held-out photographs, one example a subject and family.

    Parameters
    ----------
    sprites : str, optional
        Folder of the subjects, as `load_sprites` reads it; default those in the package.
    side : {64, 128}
        Of the pictures, in pixels.
    seed : int
        Of the scenes.
    families : sequence of str
        Of `FAMILIES`; by default those with one right answer. An example is the same whatever families are beside it.

    Raises
    ------
    ConfigError
        For another side or family, and as `load_sprites`.

    Examples
    --------
    >>> data = procedural(side=64)
    >>> data.families, data.keys[0][0].split("/")[0], data[0].references[0].size
    (('subject-driven', 'aligned'), 'place', (64, 64))
    """
    from ..toy.scenes import TOKEN, scene
    from ..toy.sprites import SUBJECTS, load_sprites

    if side not in (8 * TOKEN, 16 * TOKEN):
        raise ConfigError(f"the side of the procedural task must be {8 * TOKEN} or {16 * TOKEN} pixels, got {side}")
    families = [chosen("a family", family, FAMILIES) for family in families]
    subjects = load_sprites(SUBJECTS if sprites is None else sprites, "held-out")
    plan = [
        (subject, family, tasks[subject % len(tasks)])
        for subject in range(len(subjects))
        for family, tasks in FAMILIES.items()
        if family in families
    ]

    def open(index: int) -> Example:
        subject, family, task = plan[index]
        rows = (subject, (subject + 1) % len(subjects)) if task.endswith("pair") else (subject,)
        drawn = scene(
            subjects, (seed, subject), grid=side // TOKEN, task=task, subjects=rows, split="held-out"
        )  # fmt: skip
        return of_scene(f"{task}/{subjects.names[subject]}", family, drawn)

    keys = [(f"{task}/{subjects.names[subject]}", family) for subject, family, task in plan]
    digest = hashlib.sha256(" ".join(subjects.names).encode()).hexdigest()[:16]
    about = {"layout": "procedural", "digest": digest, "side": side, "seed": seed}
    return Examples(
        about, keys, open, targets=True, masks=True, reference_masks=True, open_scenery=OPEN_SCENERY in families
    )

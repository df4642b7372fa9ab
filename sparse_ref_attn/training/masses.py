"""Attention masses of references in training pairs, measured and kept on disk: what a selector is distilled from."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.prompt import prompt_of
from ..adapters.stream import reference_tokens
from ..errors import ConfigError
from ..files import replacing
from ..run.profile import probed_mass
from ..selection import Probe

__all__ = ["MassStore", "Masses", "measure"]

_TENSORS = ("tokens", "mass", "prompt")


@dataclass(frozen=True)
class Masses:
    """What the references of a batch of pairs got.

    Parameters
    ----------
    tokens : Tensor, shape (B, R, D)
        Rows of all references as the transformer gets them.
    mass : Tensor, shape (B, L, R), float32
        Attention of the generation's tokens to each in every block, mean over queries and heads (ReCAST eq. 2).
    prompt : Tensor, shape (B, E), float32
        Mean of the text rows; E is 0 without any.
    grids : tuple of (int, int)
        Height and width of each reference in tokens.
    """

    tokens: Tensor
    mass: Tensor
    prompt: Tensor
    grids: tuple[tuple[int, int], ...]

    def share(self, blocks: Collection[int]) -> Tensor:
        """Share of the references' attention that each token gets, mean over blocks (eq. 3), (B, R); items sum to 1."""
        mass = self.mass[:, sorted(blocks)].mean(1)
        return mass / mass.sum(-1, keepdim=True)

    @property
    def rows(self) -> list[Tensor]:
        """The tokens of each reference."""
        return list(self.tokens.split([height * width for height, width in self.grids], 1))


def measure(transformer: nn.Module, adapter: Adapter, kwargs: Kwargs) -> Masses:
    """Masses of one call in every block, each item's own.

    Parameters
    ----------
    transformer : nn.Module
    adapter : Adapter
    kwargs : dict
        The call's arguments by name.

    Raises
    ------
    ConfigError
        If the call has no references that are full grids.
    IncompatibleError
        If its attention cannot be measured.
    """
    adapter.check_measurable(transformer)
    found = adapter.find(kwargs)
    layout = None if found is None else adapter.layout(kwargs, found)
    grids = () if layout is None else tuple(r.grid for r in layout.references if r.grid is not None)
    if layout is None or not grids or len(grids) < len(layout.references):
        raise ConfigError(f"a selector is trained on references that are full grids of tokens, got {layout}")
    masses: dict[int, Tensor] = {}

    def tap(block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        view = adapter.view(layout, q, k, v, mask)
        if view is not None and view.generation is not None:
            masses[block] = torch.cat(probed_mass(Probe(), view.generation, view), -1).mean(1)

    tokens, dtype = reference_tokens(adapter, kwargs, layout), next(transformer.parameters()).dtype
    half = torch.autocast(tokens.device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16))
    with torch.no_grad(), half, adapter.listen(transformer, tap):
        transformer(**kwargs)
    prompt = prompt_of(adapter, kwargs, layout)
    mass = torch.stack([masses[block] for block in sorted(masses)], 1)
    return Masses(tokens.float(), mass, mass.new_empty(len(mass), 0) if prompt is None else prompt, grids)


class MassStore:
    """A folder of measured batches; each file is whole or absent, and a function of the settings and its number.

    Parameters
    ----------
    folder : Path
    settings : mapping
        What was measured of, JSON types.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder, self._settings = folder, json.loads(json.dumps(settings))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"

    def has(self, number: int) -> bool:
        """Whether a batch was measured, and with these settings.

        Raises
        ------
        ConfigError
            If it was measured with others.
        """
        if not self._path(number).is_file():
            return False
        self.get(number)
        return True

    def put(self, number: int, masses: Masses) -> None:
        """Keep a batch; ConfigError where it does not fit on the disk."""
        from safetensors.torch import save_file

        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(masses, name).cpu().contiguous() for name in _TENSORS}
        about = {"settings": self._settings, "grids": masses.grids}
        with replacing(self._path(number)) as draft:
            save_file(tensors, draft, {"about": json.dumps(about)})

    def get(self, number: int) -> Masses:
        """A batch that was kept.

        Raises
        ------
        ConfigError
            If the file is damaged, or was measured with other settings.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                tokens, mass, prompt = (file.get_tensor(name) for name in _TENSORS)
            found, grids = about["settings"], tuple((int(height), int(width)) for height, width in about["grids"])
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{path} must be masses that sra train --selector measured, got: {error}") from error
        for name in self._settings | found:
            if found.get(name) != self._settings.get(name):
                raise ConfigError(
                    f"a run must go on as it began: the masses in {self._folder} were measured with {name} "
                    f"{found.get(name)}, and this run has {self._settings.get(name)}. Use another folder"
                )
        return Masses(tokens, mass, prompt, grids)

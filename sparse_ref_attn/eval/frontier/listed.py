"""What is swept: every candidate, step cache and the dense run, each in all steps and in fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...candidates import CANDIDATES, DENSE
from ...config import SparseRef
from ...errors import ConfigError
from ...execution import Cache
from ...refresh import Never
from ..settings import Setting
from ..step_caches import StepCache

__all__ = ["GEOMETRIES", "STEP_CACHES", "all_settings", "setting_of", "steps_of"]

Key = tuple[str, int]
"""A key, of `candidates.CANDIDATES`, `STEP_CACHES` or `DENSE`, and the number of steps."""

STEP_CACHES: Mapping[str, StepCache] = {
    **{f"taylorseer-{every}": StepCache("TaylorSeer", every=every) for every in (2, 3)},
    **{f"taylorseer-lite-{every}": StepCache("TaylorSeer lite", every=every) for every in (2, 3, 4)},
}
"""Those whose work is known before they run, so that it can be told at a published model's sizes."""
GEOMETRIES: tuple[tuple[str, int], ...] = tuple(
    (model, references) for model in ("kontext", "klein-9b", "qwen-image-edit") for references in (1, 2, 4)
)
"""Published models and numbers of references at whose sizes work is told."""

BESIDE = "stored-once+"
"""In front of a step cache's key: beside stored references, which it allows if they are computed once."""


def setting_of(key: str, steps: int | None = None) -> Setting | None:
    """The setting of a key in so many steps; None for a key that is not known.

    Examples
    --------
    >>> setting_of("stored-thirds", 6).name, setting_of("taylorseer-2").name, setting_of("other")
    ('stored at Every(1 / 3), 6 steps', 'TaylorSeer every 2', None)
    """
    cache = STEP_CACHES.get(key.removeprefix(BESIDE))
    config = CANDIDATES.get("stored-once" if key.startswith(BESIDE) else key)
    if key != DENSE and cache is None and config is None:
        return None
    return Setting(steps, config, cache)


def steps_of(base: int) -> tuple[int, ...]:
    """The numbers of steps that are swept below `base`: about 3/4, 2/3, 1/2, 1/3, 1/4 and 1/6 of it.

    Examples
    --------
    >>> steps_of(12), steps_of(4)
    ((9, 8, 6, 4, 3, 2), (3, 2, 1))
    """
    found = (round(base * share) for share in (3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6))
    return tuple(dict.fromkeys(steps for steps in found if 1 <= steps < base))


def all_settings(base: int, keys: Sequence[str] | None = None) -> dict[Key, Setting]:
    """All that is swept beside the dense run of `base` steps, without what would be the dense run in as many steps.

    Parameters
    ----------
    base : int
    keys : sequence of str, optional
        Part of the list; the dense run in fewer steps is always there.

    Raises
    ------
    ConfigError
        For a key that is not in the list.
    """
    every = [DENSE, *CANDIDATES, *STEP_CACHES, *(BESIDE + key for key in STEP_CACHES)]
    unknown = [key for key in keys or () if key not in every]
    if unknown:
        raise ConfigError(f"candidates must be among {', '.join(every[1:])}, got {', '.join(unknown)}")
    found = {}
    for key in every if keys is None else [DENSE, *(key for key in keys if key != DENSE)]:
        for steps in (base, *steps_of(base)):
            setting = setting_of(key, None if steps == base else steps)
            assert setting is not None
            if (key == DENSE and steps < base) or (key != DENSE and _differs(setting, steps)):
                found[key, steps] = setting
    return found


def _differs(setting: Setting, steps: int) -> bool:
    """Whether a run of so many steps is another than the dense one."""
    if setting.step_cache is not None and all(map(setting.step_cache.computes, range(steps))):
        return False
    return steps > 1 if setting.config is None else not _always_full(setting.config, steps)


def _always_full(config: SparseRef, steps: int) -> bool:
    """Whether references run, all of them, at every step."""
    way = config.execute
    if not isinstance(way, Cache):
        return steps == 1 and bool(config.probes()) and config.profile == "step"
    if way.refresh is None or isinstance(way.refresh, Never):
        return steps == 1
    return len(way.refresh.steps(steps)) >= steps

"""What the methods of a grid would save on a published model, whose sizes the small ones do not have."""

from __future__ import annotations

from functools import cache

import torch

from ..config import SparseRef
from .methods import methods
from .rival_settings import is_rival, rival_setting
from .settings import Setting

__all__ = ["flop_ratio"]


@cache
def flop_ratio(method: str, keep: float, steps: int, model: str = "kontext", references: int = 1) -> float:
    """Dense work over that of a run with a method, profiling and full steps included, at a published model's sizes.

    Parameters
    ----------
    method : str
        As for `methods`, one of `vocabulary.RIVALS` or `vocabulary.COMBINED`, or "dense".
    keep : float, in (0, 1]
    steps : int
    model : str
        As for `meta_transformer`.
    references : int
        Of 1024 x 1024 pixels each, as is the output.

    Raises
    ------
    ConfigError
        For an unknown method or model, and a step cache that decides while it runs.

    Examples
    --------
    >>> [round(flop_ratio(method, 0.25, 12), 2) for method in ("edges", "cache", "fewer steps")]
    [1.74, 1.55, 4.0]
    """

    def member(method: str, own: int) -> SparseRef:
        return methods(keep, [method], steps=own, mask=torch.ones(1, 1))[method]

    if method == "dense":
        return 1.0
    setting = rival_setting(method, keep, steps, member) if is_rival(method) else Setting(config=member(method, steps))
    return setting.flop_ratio(steps, model, references)

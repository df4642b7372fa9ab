"""What the methods of a grid would save on a published model, whose sizes the small ones do not have."""

from __future__ import annotations

from functools import cache

import torch

from ..estimation import estimate
from .meta_model import meta_transformer
from .methods import methods

__all__ = ["flop_ratio"]


@cache
def flop_ratio(method: str, keep: float, steps: int, model: str = "kontext", references: int = 1) -> float:
    """Dense work over that of a run with a method, profiling and full steps included, at a published model's sizes.

    Parameters
    ----------
    method : str
        As for `methods`, or "dense".
    keep : float, in (0, 1]
    steps : int
    model : str
        As for `meta_transformer`.
    references : int
        Of 1024 x 1024 pixels each, as is the output.

    Raises
    ------
    ConfigError
        For an unknown method or model.

    Examples
    --------
    >>> round(flop_ratio("edges", 0.25, 12), 2), round(flop_ratio("cache", 0.25, 12), 2)
    (1.74, 1.55)
    """
    if method == "dense":
        return 1.0
    config = methods(keep, [method], steps=steps, mask=torch.ones(1, 1))[method]
    size = [(1024, 1024)] * references
    return estimate(meta_transformer(model), config, references=size, steps=steps).flop_ratio

"""What counts as the same: outputs, selections, and a step that did what the dense model does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN where NaN is."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def whole(step: Any, total: int, stored: bool) -> bool:
    """Whether a step did what the dense model's does."""
    return step.kept == total and not step.layers and not (stored and step.kind == "cached")


def alike(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.indices.sort().values, other.indices.sort().values)

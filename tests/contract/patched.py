"""What a new pipeline makes under a patch, computed once for each configuration and request."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

import sparse_ref_attn as sra
from tests.contract.state import steps
from tests.pipelines import Case

__all__ = ["picture", "run"]


def picture(case: Case, config: sra.SparseRef, **request: Any) -> np.ndarray:
    """What `case.call` makes; arguments must be hashable."""
    return run(case, config, **request)[0]


def run(case: Case, config: sra.SparseRef, **request: Any) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """The picture, and the kind and kept tokens of each step."""
    made, ran = _run(case, config, tuple(request.items()))
    return made, list(ran)


@cache
def _run(
    case: Case, config: sra.SparseRef, request: tuple[tuple[str, Any], ...]
) -> tuple[np.ndarray, tuple[tuple[str, int], ...]]:
    pipe = case.build()
    with sra.patched(pipe, config) as handle:
        made = case.call(pipe, **dict(request))
        made.flags.writeable = False
        return made, tuple(steps(handle))

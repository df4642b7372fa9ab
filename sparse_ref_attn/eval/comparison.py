"""What a comparison of dense and sparse runs measured: times, work, and the time it was bound to take."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from ..cost import Flops, bound_seconds
from ..patching import PatchHandle
from ..report import FlopSummary, summary
from .clock import CallTimes

__all__ = ["Comparison", "psnr"]


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. Times are medians over the repeats.

    Parameters
    ----------
    handle : PatchHandle
        Of the last sparse run, already removed: its record, overlay and attention table.
    sparse_image, dense_image : PIL.Image.Image
        Of the last repeat; `dense_image` is None when no dense run was asked for.
    sparse_times, dense_times : tuple of CallTimes
        One a repeat; `dense_times` is empty without dense runs.
    sparse_flops, dense_flops : Flops, optional
        Of the transformer in one run; None for a model whose shape is not known.
    """

    handle: PatchHandle
    sparse_image: Any
    dense_image: Any
    sparse_times: tuple[CallTimes, ...]
    dense_times: tuple[CallTimes, ...]
    sparse_flops: Flops | None
    dense_flops: Flops | None

    @property
    def sparse(self) -> CallTimes:
        """Median times of the sparse runs."""
        return _median(self.sparse_times)

    @property
    def dense(self) -> CallTimes | None:
        """Median times of the dense runs."""
        return _median(self.dense_times) if self.dense_times else None

    @property
    def flop_ratio(self) -> float | None:
        """Dense work of the transformer over the work that was done."""
        if self.dense_flops is None or self.sparse_flops is None:
            return None
        return self.dense_flops.total / self.sparse_flops.total

    @property
    def speedup(self) -> float | None:
        """Whole call, dense seconds over sparse seconds."""
        return None if self.dense is None else self.dense.whole / self.sparse.whole

    @property
    def bound_seconds(self) -> float | None:
        """The whole sparse call if nothing were lost.

        The dense run's attention time and the rest of its transformer time, each scaled by its own work (profiling
        included), and the time outside the transformer as it is.
        """
        return None if self.dense is None else self._bound(self.dense.fixed)

    @property
    def transformer_bound_seconds(self) -> float | None:
        """The same for the transformer alone."""
        return self._bound(0.0)

    def _bound(self, fixed: float) -> float | None:
        dense = self.dense
        if dense is None or dense.attention is None or self.dense_flops is None or self.sparse_flops is None:
            return None
        remaining = max(dense.transformer - dense.attention, 0.0)
        return bound_seconds(self.dense_flops, self.sparse_flops, dense.attention, remaining, fixed)

    @property
    def bound_speedup(self) -> float | None:
        """The speed-up that `bound_seconds` would be."""
        return _ratio(None if self.dense is None else self.dense.whole, self.bound_seconds)

    @property
    def measured_over_bound(self) -> float | None:
        """Measured speed over the bound's: 1 is all there is to gain; 0.90-1.05 is as it should be."""
        return _ratio(self.bound_seconds, self.sparse.whole)

    def summary(self, format: str = "text") -> Any:
        """The report of the last sparse run (`report.summary`), with the bound and the dense run's time in it."""
        work = None
        if self.dense_flops is not None and self.sparse_flops is not None:
            work = FlopSummary(
                self.dense_flops.total / 1e12, self.sparse_flops.total / 1e12, self.transformer_bound_seconds
            )
        seconds = None if self.dense is None else self.dense.transformer
        return summary(self.handle.record, format, flops=work, dense_seconds=seconds)  # type: ignore[call-overload]

    def _repr_html_(self) -> str:
        found: str = self.summary("html")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON types: every time in seconds, ratios, and the likeness of the two pictures."""
        work = {
            name: None if flops is None else {"matmul": flops.matmul, "attention": flops.attention}
            for name, flops in (("dense", self.dense_flops), ("sparse", self.sparse_flops))
        }
        return {
            "dense": _times(self.dense_times),
            "sparse": _times(self.sparse_times),
            "flops": work,
            "flop_ratio": self.flop_ratio,
            "speedup": self.speedup,
            "bound_seconds": self.bound_seconds,
            "bound_speedup": self.bound_speedup,
            "measured_over_bound": self.measured_over_bound,
            "psnr_db": None if self.dense_image is None else psnr(self.dense_image, self.sparse_image),
        }


def psnr(a: Any, b: Any) -> float | None:
    """Peak signal-to-noise ratio of two pictures of one size in dB; None when they are equal.

    It says how much the picture changed, not how good it is.

    Examples
    --------
    >>> round(psnr(np.zeros((2, 2, 3)), np.full((2, 2, 3), 25.5)), 2)
    20.0
    """
    error = float(np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2))
    return None if error == 0 else 10 * float(np.log10(255**2 / error))


def _median(times: tuple[CallTimes, ...]) -> CallTimes:
    attention = [t.attention for t in times if t.attention is not None]
    return CallTimes(
        median(t.whole for t in times),
        median(t.transformer for t in times),
        median(attention) if len(attention) == len(times) else None,
    )


def _times(times: tuple[CallTimes, ...]) -> dict[str, Any] | None:
    if not times:
        return None
    middle = _median(times)
    return {
        "seconds": middle.whole,
        "transformer_seconds": middle.transformer,
        "attention_seconds": middle.attention,
        "outside_transformer_seconds": middle.fixed,
        "each_seconds": [t.whole for t in times],
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None

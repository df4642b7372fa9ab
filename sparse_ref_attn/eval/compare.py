"""One pipeline, dense and sparse in the same run: pictures, times, work, and the time it was bound to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from ..adapters.base import Adapter, adapter_for
from ..config import SparseRef
from ..cost import Flops, bound_seconds
from ..errors import ConfigError, IncompatibleError, SparseRefError
from ..hooks.compiled import unwrap
from ..hooks.diffusers import AttentionSite, check_measurable, progress_bar_settings
from ..patching import PatchHandle, patched
from ..report import FlopSummary, summary
from ..report.work import dense_flops, recorded_flops
from .clock import CallTimes, time_call

__all__ = ["Comparison", "compare", "compare_all", "psnr"]

Made = Callable[[str, Any], None]


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


def compare(
    pipe: Any,
    config: SparseRef,
    call: Callable[[int], Any],
    *,
    steps: int,
    repeats: int = 1,
    dense: bool = True,
    made: Made | None = None,
) -> Comparison:
    """Run a pipeline dense and sparse, interleaved, and take the time of each whole call.

    Parameters
    ----------
    pipe : diffusers pipeline
        Not patched.
    config : SparseRef
        What the sparse runs keep.
    call : callable of int
        Runs the pipeline for so many steps and returns the picture; every call starts from the same seed.
    steps : int
        Steps of a run.
    repeats : int
        Dense and sparse runs, in turns, after a warm-up of one step dense and at most two sparse.
    dense : bool
        False measures the sparse run alone; there is then no speed-up and no bound.
    made : callable of (str, picture), optional
        Given each picture as soon as it exists, "dense" or "sparse", so that none is lost to what fails later.

    Raises
    ------
    ConfigError
        If `steps` or `repeats` is below 1.
    SparseRefError
        What `patch` refuses.

    Examples
    --------
    >>> from PIL import Image
    >>> import torch, sparse_ref_attn as sra
    >>> from sparse_ref_attn.eval.embedded import kontext_pipeline
    >>> pipe = kontext_pipeline("tiny")
    >>> pipe.set_progress_bar_config(disable=True)
    >>> call = lambda steps: pipe(
    ...     prompt="a cup", image=Image.new("RGB", (32, 32)), height=32, width=32, max_area=32 * 32,
    ...     _auto_resize=False, max_sequence_length=16, num_inference_steps=steps,
    ...     generator=torch.Generator().manual_seed(0)).images[0]
    >>> result = compare(pipe, sra.SparseContext(0.25, "grid"), call, steps=2)
    >>> result.handle.record.steps[1].kept, result.flop_ratio > 1, result.bound_seconds < result.dense.whole
    (16, True, True)
    """
    return compare_all(pipe, {"sparse": config}, call, steps=steps, repeats=repeats, dense=dense, made=made)["sparse"]


def compare_all(
    pipe: Any,
    configs: Mapping[str, SparseRef],
    call: Callable[[int], Any],
    *,
    steps: int,
    repeats: int = 1,
    dense: bool = True,
    refused: dict[str, str] | None = None,
    made: Made | None = None,
) -> dict[str, Comparison]:
    """As `compare`, for several configurations that run in turns and share the dense runs.

    Parameters
    ----------
    pipe, call, steps, repeats, dense, made
        As in `compare`; a sparse picture goes by the name of its configuration.
    configs : mapping of str to SparseRef
        By the name that the progress bar shows.
    refused : dict, optional
        Takes the name of each configuration that cannot run and why; without it the first such error is raised.

    Returns
    -------
    dict of str to Comparison
        In the order of `configs`, without those refused.

    Raises
    ------
    ConfigError, SparseRefError
        As `compare`.
    """
    if min(steps, repeats) < 1:
        raise ConfigError(f"steps and repeats must be at least 1, got {steps} and {repeats}")
    made = (lambda name, picture: None) if made is None else made
    transformer = unwrap(pipe.transformer)
    adapter = adapter_for(transformer)
    sites = _sites(adapter, transformer)
    with _labelled(pipe, "warm-up"):
        if dense:
            call(1)
        for name, config in list(configs.items()):
            try:
                with patched(pipe, config):
                    call(min(steps, 2))
            except SparseRefError as error:
                if refused is None:
                    raise
                refused[name] = str(error)
    configs = {name: config for name, config in configs.items() if name not in (refused or {})}
    dense_image, dense_times = None, []
    times: dict[str, list[CallTimes]] = {name: [] for name in configs}
    last: dict[str, tuple[PatchHandle, Any]] = {}
    for repeat in range(repeats):
        turn = f" {repeat + 1} of {repeats}" if repeats > 1 else ""
        if dense:
            with _labelled(pipe, "dense" + turn):
                dense_image, taken = time_call(lambda: call(steps), transformer, sites)
            made("dense", dense_image)
            dense_times.append(taken)
        for name, config in configs.items():
            with _labelled(pipe, name + turn), patched(pipe, config) as handle:
                image, taken = time_call(lambda: call(steps), transformer, ())
            made(name, image)
            times[name].append(taken)
            last[name] = handle, image
    shape = adapter.shape(transformer) if adapter.streams else None
    return {
        name: Comparison(
            handle,
            image,
            dense_image,
            tuple(times[name]),
            tuple(dense_times),
            None if shape is None else recorded_flops(shape, handle.record),
            None if shape is None else dense_flops(shape, handle.record),
        )
        for name, (handle, image) in last.items()
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


def _sites(adapter: Adapter, transformer: Any) -> list[AttentionSite]:
    """The attention whose time is taken; none where it cannot be."""
    sites = adapter.sites(transformer)
    try:
        check_measurable(sites, adapter.name)
    except IncompatibleError:
        return []
    return sites


@contextmanager
def _labelled(pipe: Any, text: str) -> Iterator[None]:
    """Inside, the pipeline's progress bar says `text`."""
    settings = progress_bar_settings(pipe)
    pipe.set_progress_bar_config(**{**settings, "desc": text})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**settings)


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

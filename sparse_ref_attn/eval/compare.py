"""One pipeline, dense and sparse in the same run: pictures, times, work, and the time it was bound to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..batching.progress import NoBar, SequentialBar
from ..config import SparseRef
from ..errors import ConfigError, SparseRefError
from ..hooks.compiled import unwrap
from ..models import adapter_for
from ..patching import PatchHandle, patched
from ..report.work import dense_flops, recorded_flops
from .clock import CallTimes, time_call, timed_sites
from .comparison import Comparison

__all__ = ["compare", "compare_all", "one_bar"]

Made = Callable[[str, Any], None]


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
    sites = timed_sites(adapter, transformer)
    short = min(steps, 2)
    make = getattr(pipe, "progress_bar", NoBar)  # a modular pipeline's blocks have bars of their own
    bar = SequentialBar(make, dense + short * len(configs) + repeats * steps * (dense + len(configs)))
    with one_bar(pipe, bar):
        bar.say("warm-up")
        if dense:
            call(1)
        for name, config in list(configs.items()):
            try:
                with patched(pipe, config):
                    call(short)
            except SparseRefError as error:
                if refused is None:
                    raise
                refused[name] = str(error)
                bar.fewer(short + repeats * steps)
        configs = {name: config for name, config in configs.items() if name not in (refused or {})}
        dense_image, dense_times = None, []
        times: dict[str, list[CallTimes]] = {name: [] for name in configs}
        last: dict[str, tuple[PatchHandle, Any]] = {}
        for repeat in range(repeats):
            turn = f" {repeat + 1} of {repeats}" if repeats > 1 else ""
            if dense:
                bar.say("dense" + turn)
                dense_image, taken = time_call(lambda: call(steps), transformer, sites)
                made("dense", dense_image)
                dense_times.append(taken)
            for name, config in configs.items():
                bar.say(name + turn)
                with patched(pipe, config) as handle:
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


@contextmanager
def one_bar(pipe: Any, bar: SequentialBar) -> Iterator[None]:
    """Inside, the pipeline's calls move one bar, with the time that is left."""
    own = vars(pipe)  # past the pipeline's __setattr__, which would note the bar in its config
    before = own.get("progress_bar")
    own["progress_bar"] = bar.part
    try:
        yield
    finally:
        bar.close()
        if before is None:
            del own["progress_bar"]
        else:
            own["progress_bar"] = before

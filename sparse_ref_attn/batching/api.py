"""A batch in which every item has references, sizes and kept tokens of its own.

Each item is the pipeline's own call, on a shallow copy of the pipeline with a scheduler of its own. Where a call would
run the transformer it waits; when all have come that far, the transformer runs once for all of them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import SparseRef
from ..errors import ConfigError, IncompatibleError, UnsupportedModelError
from ..hooks.diffusers import check_no_step_cache
from ..hooks.instance import check_free
from ..patching.api import PURPOSE, generations_of, resolve
from ..patching.handle import PatchHandle
from ..patching.pixels import PixelTap
from ..presets import configuration
from .arguments import item_arguments
from .batch_run import BatchRun
from .progress import SharedBar
from .result import BatchResult

__all__ = ["batch"]

_BUSY: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Transformers on which a batch runs."""


def batch(
    pipe: Any,
    prompts: Sequence[str | None],
    images: Sequence[Sequence[Any]],
    *,
    config: SparseRef | float | str | None = None,
    generators: Sequence[torch.Generator] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
    **arguments: Any,
) -> BatchResult:
    """Generate several pictures at once, each from references of its own.

    Every item runs the pipeline's own call, and the items meet at the transformer, which runs once
    for all of them: packed end to end (FLUX.2, Klein) or padded, with attention within each item
    (Kontext, Qwen-Image-Edit). Each gets the picture that it would get alone, to rounding.

    Parameters
    ----------
    pipe : diffusers pipeline
        Is as it was when the call returns or raises. A patch on it rests meanwhile.
    prompts : sequence of str
        One an item; None where `each` has the item's embeddings.
    images : sequence of sequences
        The references of each item, any number of any size; an empty one where the pipeline also
        runs without.
    config : SparseRef, str, float or int, optional
        What is kept of each item's references: ranked, budgeted and reported for each item by
        itself. Default: that of the patch on `pipe`, or "balanced", as `patch`.
        ``SparseContext(1.0, "grid")`` keeps everything.
    generators : sequence of torch.Generator, optional
        One an item, all different. Without them noise comes from torch's own generator, in the
        order of the items.
    each : sequence of dict, optional
        Further arguments of one item's call (negative_prompt, height, mask_image, ...), over the
        common ones.
    **arguments
        Arguments of every item's call, such as ``num_inference_steps=28``.

    Returns
    -------
    BatchResult
        ``images``, ``outputs`` (what each call returned), ``handles`` (each item's report), `summary()`.

    Raises
    ------
    BatchError
        If an item's own call fails: it names the item, and ``__cause__`` is what was raised. The
        other items end with it.
    ConfigError
        If numbers of prompts, images, generators or arguments disagree, two items share a generator,
        or the pipeline cannot take an item's number of references.
    IncompatibleError
        If the model's attention cannot be told apart by item, a step cache or context parallelism
        is on, or the items differ in something that one transformer call has once (such as ``joint_attention_kwargs``).
    UnsupportedModelError, VersionError
        As `patch`.

    Notes
    -----
    Items may differ in output size, number of steps and guidance; one that is done leaves. Only one
    of them runs at a time, in the order given, so text encoder and VAE see one item after another.
    A profiling step is a dense one in the same joined call, each item measured on its own rows.

    Some calls run by themselves: those that keep or read reference K/V (Klein-KV), those whose attention
    mask is not of keys alone (one between rows, one for each head, a bias), and the last item when the
    others are done. An attention mask of keys is each item's own.

    Attention of joined calls is `functional.gather_attention`, whatever
    attention backend the pipeline was set to, and compiled blocks run eagerly in them.

    Activations of all items are held at once, and their latents until the end.

    One timestep for all is found by comparing them: on CUDA a sync a call. No attention layer makes one.

    Examples
    --------
    >>> import torch, PIL.Image
    >>> import sparse_ref_attn as sra
    >>> from sparse_ref_attn.eval.embedded import kontext_pipeline
    >>> pipe = kontext_pipeline(size="tiny")
    >>> pipe.set_progress_bar_config(disable=True)
    >>> small, wide = PIL.Image.new("RGB", (32, 32), "red"), PIL.Image.new("RGB", (64, 32), "blue")
    >>> done = sra.batch(
    ...     pipe, ["a cat", "a dog"], [[small], [wide]], config=sra.SparseContext(0.5, "grid"),
    ...     generators=[torch.Generator().manual_seed(i) for i in range(2)],
    ...     num_inference_steps=2, height=32, width=32, max_area=32 * 32, _auto_resize=False,
    ... )
    >>> [image.size for image in done.images], [handle.record.steps[0].kept for handle in done.handles]
    ([(32, 32), (32, 32)], [32, 64])
    """
    calls = item_arguments(pipe, prompts, images, generators, each, arguments)
    transformer, adapter = resolve(pipe)
    missing = [name for name in ("scheduler", "progress_bar", "maybe_free_model_hooks") if not hasattr(pipe, name)]
    if missing:
        raise UnsupportedModelError(
            f"a batch needs a pipeline with {', '.join(missing)}, as diffusers' DiffusionPipeline has them and modular "
            f"pipelines and bare transformers have not, got {type(pipe).__name__}"
        )
    own = generations_of(transformer)
    config = own.config if config is None and own is not None else configuration(config)
    if config.from_block or config.profile == "in_flight":
        raise ConfigError(
            'a batch drops tokens at the transformer\'s input: from_block must be 0 and profile "step", got '
            f"{config.from_block} and {config.profile!r}"
        )
    check_free(transformer, PURPOSE)
    check_no_step_cache(transformer)
    if transformer in _BUSY:
        raise IncompatibleError("a batch must not begin on a transformer on which another batch runs: wait for its end")
    run = BatchRun(pipe, pipe.transformer, adapter, config, len(calls))
    bar = SharedBar(pipe.progress_bar)
    for item, kwargs in zip(run.items, calls, strict=True):
        item.start(pipe.transformer, bar, kwargs)
    with contextlib.ExitStack() as undo:
        _BUSY.add(transformer)
        undo.callback(_BUSY.discard, transformer)
        undo.callback(pipe.maybe_free_model_hooks)
        undo.callback(bar.close)
        if own is not None:
            undo.enter_context(own.resting())
        vae = getattr(pipe, "vae", None)
        tap = PixelTap(vae) if isinstance(vae, nn.Module) and hasattr(vae, "encode") else None
        if tap is not None:
            undo.callback(tap.remove)
        run.ragged.install()
        undo.callback(run.ragged.remove)
        undo.callback(run.end)
        run.run(tap)
    handles = [PatchHandle(item.generations, transformer, item.generations.forget) for item in run.items]
    padding = 0.0 if run.rows == 0 else 1 - run.live / run.rows
    return BatchResult([item.lockstep.result for item in run.items], handles, run.joined, run.alone, padding)

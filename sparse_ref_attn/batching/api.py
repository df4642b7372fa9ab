"""A batch in which every item has references, sizes and kept tokens of its own.

Each item is the pipeline's own call, on a shallow copy of the pipeline with a scheduler of its own. Where a call would
run the transformer it waits; when all have come that far, the transformer runs once for all of them.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.joining import with_sample
from ..config import SparseRef
from ..errors import BatchError, ConfigError, IncompatibleError, UnsupportedModelError
from ..hooks.compiled import eager_blocks, unwrap
from ..hooks.diffusers import check_no_step_cache
from ..hooks.instance import check_free
from ..patching.api import PURPOSE, generations_of, resolve
from ..patching.call import GenerationCall
from ..patching.execution.ragged import Item, Ragged
from ..patching.generations import Generations
from ..patching.handle import PatchHandle
from ..patching.measuring import view_with_lse
from ..patching.pixels import PixelTap
from ..presets import configuration
from ..timing import Stopwatch
from .arguments import item_arguments
from .lockstep import Lockstep
from .progress import SharedBar
from .result import BatchResult

__all__ = ["batch"]

_BUSY: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Transformers on which a batch runs."""


class _Frozen(Stopwatch):
    """The time of a joined call, which each of its items reports."""

    def __init__(self, watch: Stopwatch) -> None:
        self._first, self._last = watch._first, watch._last

    def stop(self, device: torch.device) -> None:
        return None


class _Seat:
    """Stands in for the transformer in one item's pipeline: its calls wait for the others."""

    def __init__(self, transformer: nn.Module, ask: Callable[[Any], Any]) -> None:
        self._transformer, self._ask = transformer, ask

    @property  # type: ignore[misc]  # isinstance sees the transformer's class
    def __class__(self) -> Any:
        return type(self._transformer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask((args, kwargs, torch.is_grad_enabled()))

    def cache_context(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # a context of the model would be left while another item runs


class _BatchItem:
    """One item: its copy of the pipeline, its thread, its generation."""

    def __init__(self, index: int, pipe: Any, model: nn.Module, adapter: Adapter, config: SparseRef) -> None:
        self.index = index
        self.pipe = copy.copy(pipe)
        self.own = vars(self.pipe)  # set past the pipeline's __setattr__, which would note the seat in its config
        self.own["scheduler"] = copy.deepcopy(pipe.scheduler)
        self.own["maybe_free_model_hooks"] = lambda: None  # the batch does it once, at its end
        self.generations = Generations(model, self.pipe, config, adapter)
        self._adapter = adapter
        self._call: GenerationCall | None = None
        self.looks = False
        """Whether the attention of the joined call that runs is to be shown to `look`."""

    def start(self, model: nn.Module, bar: SharedBar, arguments: Kwargs) -> None:
        def call(ask: Callable[[Any], Any]) -> Any:
            self.own["transformer"] = _Seat(model, ask)
            return self.pipe(**arguments)

        self.own["progress_bar"] = bar.part
        self.lockstep = Lockstep(call)

    def before(self, transformer: nn.Module, kwargs: Kwargs, together: bool) -> list[Item]:
        """The item's call with the rows that take part, one `Item` for each picture it makes at once."""
        call = self._call = self.generations.call(transformer, kwargs, eager=together)
        if call is not None:
            self.looks, call.measures = together and call.measures, call.measures and not together
            kwargs = call.enter()
        short = None if call is None else call.shortened
        return [Item(part, short) for part in (self._adapter.items(kwargs) if together else [kwargs])]

    def after(self, output: Any, watch: Stopwatch | None = None) -> Any:
        """The output as the item's call expects it."""
        call, self._call, self.looks = self._call, None, False
        if call is None:
            return output
        if watch is not None:
            call.watch = _Frozen(watch)
        return call.leave(output)

    def look(self, block: int, parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]) -> None:
        """Measure one attention call of a profiling step, all of the item's pictures."""
        assert self._call is not None
        q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))  # type: ignore[misc]
        masks = [part[3] for part in parts if part[3] is not None]
        lses = [part[4] for part in parts if part[4] is not None]
        mask, lse = (torch.cat(given) if given else None for given in (masks, lses))
        view = view_with_lse(self._adapter, self._call.layout, q, k, v, mask, lse)
        if view is not None:
            self._call.run.observe(self._call.at.step, block, view)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Errors inside say which item they come from."""
        try:
            yield
        except BatchError:
            raise
        except Exception as error:
            raise BatchError(
                f"item {self.index} of the batch failed: {type(error).__name__}: {error}", self.index
            ) from error


class _Run:
    """The items of a batch around one transformer."""

    def __init__(self, pipe: Any, model: nn.Module, adapter: Adapter, config: SparseRef, count: int) -> None:
        self.model, self.transformer, self.adapter = model, unwrap(model), adapter
        self.ragged = Ragged(self.transformer, adapter)
        self.items = [_BatchItem(i, pipe, self.transformer, adapter, config) for i in range(count)]
        self.joined = self.alone = self.rows = self.live = 0

    def run(self, tap: PixelTap | None) -> None:
        """All items to their end, in lockstep."""
        live = [(item, None) for item in self.items]
        while live:
            waiting = []
            for item, answer in live:
                asks = item.lockstep.resume(answer)
                if item.lockstep.error is not None:
                    with item.named():
                        raise item.lockstep.error
                if asks:
                    waiting.append(item)
                    item.generations.pixels = None if tap is None else tap.handed_over()
            live = list(zip(waiting, self._serve(waiting), strict=True))

    def end(self) -> None:
        for item in self.items:
            item.lockstep.end()

    def _serve(self, waiting: Sequence[_BatchItem]) -> list[Any]:
        """What each waiting item's transformer call returns."""
        calls, answers = {}, {}
        for item in waiting:
            args, kwargs, grad = item.lockstep.request
            calls[item.index] = (self.adapter.bind(self.transformer, args, kwargs), grad)
        meeting = [
            item
            for item in waiting
            if item.generations.store is None and self.adapter.cannot_join(calls[item.index][0]) is None
        ]
        if len(meeting) == 1:
            meeting = []
        for item in waiting:
            if item not in meeting:
                with item.named():
                    answers[item.index] = self._run_alone(item, *calls[item.index])
        if meeting:
            answers |= self._run_joined(meeting, calls)
        return [answers[item.index] for item in waiting]

    def _run_alone(self, item: _BatchItem, kwargs: Kwargs, grad: bool) -> Any:
        self.alone += 1
        with torch.set_grad_enabled(grad):
            output = None
            ((call,),) = [item.before(self.transformer, kwargs, together=False)]
            try:
                with self.ragged.alone(call.short):
                    output = self.model(**call.kwargs)
            finally:
                output = item.after(output)
            return output

    def _run_joined(self, meeting: Sequence[_BatchItem], calls: Mapping[int, tuple[Kwargs, bool]]) -> dict[int, Any]:
        self.joined += 1
        parts: list[tuple[_BatchItem, int]] = []
        flat: list[Item] = []
        for item in meeting:
            with item.named():
                own = item.before(self.transformer, calls[item.index][0], together=True)
            parts += [(item, len(own))] * len(own)
            flat += own
        seen: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]] = {}

        def tap(at: int, block: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor | None) -> None:
            item, count = parts[at]
            if not item.looks:
                return
            own = seen.setdefault(item.index, [])
            own.append((q, k, v, mask, lse))
            if len(own) == count:
                with item.named():
                    item.look(block, seen.pop(item.index))

        profiles = any(item.looks for item in meeting)
        with (
            torch.set_grad_enabled(calls[meeting[0].index][1]),
            eager_blocks(self.transformer),
            self.ragged.joined(flat, tap=tap if profiles else None) as call,
        ):
            device = call.kwargs[self.adapter.tokens].device
            self.rows, self.live = self.rows + call.rows, self.live + call.live
            watch = Stopwatch(device)
            output = self.model(**call.kwargs)
            watch.stop(device)
            samples = iter(call.samples(output))
            answers = {}
            for item in meeting:
                rows = torch.cat([next(samples) for other, _ in parts if other is item])
                with item.named():
                    answers[item.index] = item.after(with_sample(output, rows), watch)
        return answers


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
        itself. Default: that of the patch on `pipe`, or ``ReCAST()``, as `patch`.
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
    run = _Run(pipe, pipe.transformer, adapter, config, len(calls))
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

"""One patched ComfyUI model: its samplings, which step a call belongs to, and what the call is given."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_ref_attn.adapters import PlainAdapter
from sparse_ref_attn.errors import IncompatibleError, LayoutError, PixelsUnavailableError
from sparse_ref_attn.estimation import at_share_of_sites
from sparse_ref_attn.eval.ways import family_of
from sparse_ref_attn.hooks.diffusers import AttentionSite
from sparse_ref_attn.packing import kept_rows
from sparse_ref_attn.record import RunRecord
from sparse_ref_attn.run import Probing, Run
from sparse_ref_attn.schedules import Clock
from sparse_ref_attn.timing import Stopwatch, Stopwatches
from sparse_ref_attn.types import TokenLayout

from . import rows as lying
from .listening import Listener

__all__ = ["Sampling"]


@dataclass
class _Call:
    """One call of the model while it runs."""

    adapter: PlainAdapter
    layout: TokenLayout
    rows: Tensor | None
    kept: int
    seen: bool = False


@dataclass
class _Generation:
    """One sampling: its noise levels, and a run for each set of references."""

    sigmas: list[float]
    runs: dict[Any, Run] = field(default_factory=dict)
    measured: set[tuple[int, int]] = field(default_factory=set)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def step(self, sigma: float) -> int:
        """The step that a noise level lies in; samplers of higher order ask in between."""
        reached = sum(level >= sigma * (1 - 1e-5) for level in self.sigmas[:-1])
        return max(0, reached - 1)


class Sampling:
    """What a patched model does in every sampling.

    Parameters
    ----------
    way : str
        Of ``sparse_ref_attn.eval.ways.WAYS``; none that changes tokens, or stores them.
    share : float, in (0, 1]
        Mean share of the reference tokens over all steps.
    seed : int
        Of what a rule draws.
    pixels : sequence of Tensor, shape (1, 3, H, W), -1 to 1
        The references' pictures in order, for rules that look at them.

    Notes
    -----
    Its three methods are what ComfyUI calls: `outer_sample` around a sampling, `diffusion_model` around the model's
    forward, and `post_input` where tokens and positions are embedded and no block has run. One sync a call, for the
    noise level.
    """

    def __init__(self, way: str, share: float, seed: int = 0, pixels: Sequence[Tensor] = ()) -> None:
        self._way, self._share, self._seed, self._pixels = way, share, seed, tuple(pixels)
        self._generation: _Generation | None = None
        self._own = threading.local()
        self.record: RunRecord | None = None

    def __deepcopy__(self, memo: Any) -> Sampling:
        """Itself: ComfyUI copies a model's options with the model, and all copies share one patch."""
        return self

    # -- what ComfyUI calls --------------------------------------------------------------------

    def outer_sample(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """One sampling."""
        with self._sampling(sigmas):
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the model, on the tokens that its step keeps."""
        began = time.perf_counter()
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        bound.apply_defaults()
        given, generation = bound.arguments, self._generation
        references, options = given.get("ref_latents"), given.get("transformer_options") or {}
        if not references or generation is None or "sigmas" not in options:
            return executor(*args, **kwargs)
        step = generation.step(float(options["sigmas"].max()))
        call, run = self._call(executor.class_obj, given, references, options, generation)
        plan = run.plan(step)
        own = run.step_record(step, plan.kind, plan.kept(run.layout), plan)
        if own.calls == 0:
            own.seconds = Stopwatches()
        own.calls += 1
        given["transformer_options"] = options = dict(options)
        listener = self._listener(plan.kind, run, step, call, options, generation)
        if listener is not None:
            options["optimized_attention_override"] = listener
        if plan.selection is not None:
            call.rows, call.kept = kept_rows(call.layout, plan.selection), plan.selection.kept
            self._cut_masks(given, call)
        own.host_seconds += time.perf_counter() - began
        watch = Stopwatch(given["x"].device)
        with self._running(call):
            output = executor(*bound.args, **bound.kwargs)
        watch.stop(given["x"].device)
        assert isinstance(own.seconds, Stopwatches)
        own.seconds.append(watch)
        if not call.seen:
            raise IncompatibleError(
                "the model's forward must call the patches named post_input, with which tokens are dropped, got a "
                f"{type(executor.class_obj).__name__} that does not: update ComfyUI"
            )
        return output

    def post_input(self, args: dict[str, Any]) -> dict[str, Any]:
        """The embedded rows and their positions, without those that are dropped."""
        call = getattr(self._own, "call", None)
        if call is None:
            return args
        call.seen = True
        rows = args["img"].shape[1]
        if rows != call.layout.rows:
            raise LayoutError(
                f"the image stream must have {call.layout.rows} rows, got {rows}: another node (Flux KV Cache?) has "
                "changed them; use one of the two"
            )
        call.layout = call.adapter.layout(args, call.adapter.find(args))
        if call.rows is None:
            return args
        if "transformer_options" in args:  # where it has the rows of each reference, other nodes go by their sum
            args["transformer_options"]["reference_image_num_tokens"] = [call.kept]
        short: dict[str, Any] = call.adapter.drop(args, call.layout, call.rows)
        return short

    # -- one sampling --------------------------------------------------------------------------

    @contextmanager
    def _sampling(self, sigmas: Tensor) -> Iterator[None]:
        levels = [float(level) for level in sigmas]
        falls = len(levels) > 1 and levels[0] > levels[-1]  # an inversion's rise: it runs dense
        self.record = None
        self._generation = _Generation(levels) if falls else None
        try:
            yield
        finally:
            self._generation = None

    def _call(
        self, model: Any, given: dict[str, Any], references: Sequence[Tensor], options: Any, generation: _Generation
    ) -> tuple[_Call, Run]:
        kinds, patch, x = lying.kinds_of(model), model.patch_size, given["x"]
        own, others = lying.rows_of(x, patch)[0], [lying.rows_of(latent, patch) for latent in references]
        marks = options.get("cond_or_uncond") or [0]
        adapter = lying.adapter_of(kinds, own, others, lying.conditional_of(marks, x.shape[0]))
        rows = own + sum(length for length, _ in others)
        sizes = {"img": x.new_empty(0).expand(x.shape[0], rows, 0), "txt": given["context"]}
        layout = adapter.layout(sizes, adapter.find(sizes))
        key = (tuple(options.get("uuids") or ()), layout.references)
        if key not in generation.runs:
            generation.runs[key] = self._run(kinds, layout, references, patch, generation)
        run = generation.runs[key]
        if 0 in marks or self.record is None:
            self.record = run.record
        return _Call(adapter, layout, None, layout.reference_tokens), run

    def _run(
        self, kinds: list[str], layout: TokenLayout, references: Sequence[Tensor], patch: int, generation: _Generation
    ) -> Run:
        """The run of these references; another condition's, where that has the same ones."""
        tokens = torch.cat([lying.pack(latent, patch) for latent in references], dim=1)
        for run in generation.runs.values():
            if run.layout.references == layout.references and torch.equal(run.references.tokens[:1], tokens[:1]):
                return run
        family = family_of(self._way, steps=generation.steps, seed=self._seed)
        sites = [AttentionSite(None, kind) for kind in kinds]
        config = at_share_of_sites(sites, family, self._share, generation.steps)
        pixels = [*self._pixels, *[None] * len(references)][: len(references)]
        clock: Callable[[int], Clock] = lambda step: Clock.uniform(step, generation.steps)  # noqa: E731
        try:
            return Run(config, Probing.of(config, kinds), layout, tokens, pixels, generation.steps, clock)
        except PixelsUnavailableError as error:
            raise PixelsUnavailableError(
                f"the rule {self._way!r} looks at pixels: connect the photo of each reference, in order, to "
                f"reference_1, reference_2, ...; got {len(self._pixels)} for {len(references)}"
            ) from error

    def _listener(
        self, kind: str, run: Run, step: int, call: _Call, options: dict[str, Any], generation: _Generation
    ) -> Listener | None:
        """What measures the call's attention: one call of a profiling step, with the prompt."""
        key = (id(run), step)
        if kind != "profile" or key in generation.measured or 0 not in (options.get("cond_or_uncond") or [0]):
            return None
        generation.measured.add(key)
        return Listener(run, step, call, options.get("optimized_attention_override"))

    @staticmethod
    def _cut_masks(given: dict[str, Any], call: _Call) -> None:
        assert call.rows is not None
        text, length = call.layout.text, call.layout.text + call.layout.rows
        for arguments in (given, given.get("kwargs") or {}):
            if arguments.get("attention_mask") is not None:
                mask = lying.cut_mask(arguments["attention_mask"], text, call.rows, length)
                arguments["attention_mask"] = mask

    @contextmanager
    def _running(self, call: _Call) -> Iterator[None]:
        self._own.call = call
        try:
            yield
        finally:
            self._own.call = None

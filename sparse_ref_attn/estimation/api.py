"""What a run will cost, before it runs: FLOPs, tokens and memory from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from ..adapters.base import adapter_for
from ..config import SparseRef
from ..cost import (
    Flops,
    Memory,
    ModelShape,
    StepTokens,
    reference_kv_bytes,
    room_bytes,
    run_flops,
    scoring_flops,
    step_memory,
)
from ..errors import ConfigError
from ..execution import Cache
from ..hooks.diffusers import gives_lse
from ..patching.execution.cache import check_cache
from ..presets import ReCAST
from ..record import mean_over_blocks
from ..refresh import Drift
from ..run import Budgeting, Probing, Timeline
from ..run.timeline import PlannedStep
from ..schedules import Clock
from ..types import Reference, TokenLayout
from .cache import run_work, with_cache

__all__ = ["Estimate", "RunMemory", "estimate"]

Size = tuple[int, int]


@dataclass(frozen=True)
class RunMemory:
    """Bytes at the peak of a run, and what a cache of reference keys and values would hold.

    Parameters
    ----------
    dense, sparse : Memory
        Of the largest step. A run with a dense profiling step peaks there, so its peak is the dense one.
    sparse_step : Memory
        Of the largest step that drops tokens; `dense` when none does.
    dense_reference_kv, sparse_reference_kv : int
        Keys and values of the reference tokens over all layers and branches of guidance, all of them and the most that
        a sparse step keeps. Nothing is stored when tokens are dropped at the input: this is what a reference cache
        would take.
    room : int
        Rows of text and generation beside the stored ones, with ``execute="cache"`` or "both".
    """

    dense: Memory
    sparse: Memory
    sparse_step: Memory
    dense_reference_kv: int
    sparse_reference_kv: int
    room: int = 0


@dataclass(frozen=True)
class Estimate:
    """A run in numbers, made by `estimate`.

    Parameters
    ----------
    model, config : str
        The model family, and the configuration in one line.
    text, generation : int
        Text tokens, and tokens of the image being made.
    references : tuple of int
        Tokens of each reference.
    kinds : tuple of {"dense", "profile", "in_flight", "sparse", "cached"}
        What each step does; "profile" is dense and measures attention, "in_flight" is so in its first blocks, "cached"
        reads stored keys and values.
    tokens : tuple of int
        Reference tokens that take part in each step, all references together.
    from_block : tuple of int
        Block of each step from which on only these take part, 0 for the transformer's input.
    blocks : int
        Blocks of the transformer.
    dense, sparse : Flops
        Of the run with every token, and as it would run, profiling and `scoring` included.
    scoring : Flops
        Of measuring attention.
    memory : RunMemory
        In bytes; activations are an estimate to about 15 % (`cost.step_memory`).
    notes : tuple of str
        What the numbers leave out, in words.
    """

    model: str
    config: str
    text: int
    generation: int
    references: tuple[int, ...]
    kinds: tuple[str, ...]
    tokens: tuple[int, ...]
    from_block: tuple[int, ...]
    blocks: int
    dense: Flops
    sparse: Flops
    scoring: Flops
    memory: RunMemory
    notes: tuple[str, ...] = ()

    @property
    def mean_tokens(self) -> float:
        """Reference tokens a step, averaged over all steps, dense ones included, and over the blocks of a step."""
        total, by_step = sum(self.references), zip(self.tokens, self.from_block, strict=True)
        return sum(mean_over_blocks(kept, total, first, self.blocks) for kept, first in by_step) / len(self.tokens)

    @property
    def flop_ratio(self) -> float:
        """Dense work over sparse work, at least 1 for a budget that saves anything.

        Not the bound of the speed-up: attention and matrix products run at different rates (`cost.bound_seconds`).
        """
        return self.dense.total / self.sparse.total

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types, with `mean_tokens` and `flop_ratio`."""
        out = asdict(self)
        for name in ("references", "kinds", "tokens", "from_block", "notes"):
            out[name] = list(out[name])
        return out | {"mean_tokens": self.mean_tokens, "flop_ratio": self.flop_ratio}

    def summary(self) -> str:
        """The estimate as text, a few lines."""
        total, memory = sum(self.references), self.memory
        drops = ("sparse", "in_flight", "cached")
        dropping = [n for n, kind in zip(self.tokens, self.kinds, strict=True) if kind in drops]
        kept = f", {min(dropping)} to {max(dropping)} on sparse steps" if dropping else ""
        lines = [
            f"{self.model}: {self.config}",
            f"tokens      {self.text} text, {self.generation} generation, "
            f"{' + '.join(map(str, self.references))} reference",
            f"steps       {len(self.kinds)}: {self.kinds.count('sparse') + self.kinds.count('cached')} sparse, "
            f"{self.kinds.count('profile')} profiling, {self.kinds.count('in_flight')} profiling in flight, "
            f"{self.kinds.count('dense')} dense",
            f"kept        {self.mean_tokens:.0f} of {total} reference tokens on average{kept}",
            f"work        {self.dense.total / 1e12:.1f} TFLOP dense, {self.sparse.total / 1e12:.1f} sparse "
            f"({self.scoring.total / 1e12:.1f} of it scoring): FLOP ratio {self.flop_ratio:.2f}",
            f"memory      {_gb(memory.dense.parameters)} parameters; activations "
            f"{_gb(memory.dense.activations)} dense, "
            f"{_gb(memory.sparse_step.activations)} on sparse steps; peak {_gb(memory.dense.total)} dense, "
            f"{_gb(memory.sparse.total)} sparse",
            f"cached K/V  {_gb(memory.dense_reference_kv)} for all reference tokens, "
            f"{_gb(memory.sparse_reference_kv)} for the kept ones, "
            + (f"and {_gb(memory.room)} of room beside them" if memory.room else "if they were stored"),
        ]
        return "\n".join([*lines, *(f"note        {note}" for note in self.notes)])


def estimate(
    transformer: nn.Module,
    *,
    references: Sequence[Size] = ((1024, 1024),) * 3,
    output: Size = (1024, 1024),
    text_tokens: int = 512,
    steps: int = 28,
    config: SparseRef | None = None,
    batch: int = 1,
    calls_per_step: int = 1,
    pixels_per_token: int = 16,
) -> Estimate:
    """Tokens, FLOPs and memory of a run, from sizes alone: nothing is run and no weight is read.

    Parameters
    ----------
    transformer : torch.nn.Module
        A supported transformer on any device, the meta device included (`adapters.geometries.named_model`).
    references : sequence of (int, int)
        (width, height) of each reference in pixels, as the pipeline encodes it.
    output : (int, int)
        (width, height) of the image being made, in pixels.
    text_tokens : int
        Tokens of the prompt in joint attention, padding included.
    steps : int
        Denoising steps, >= 1.
    config : SparseRef, optional
        Default ``ReCAST()``, as for `patch`.
    batch : int
        Items of one transformer call (2 with batched classifier-free guidance).
    calls_per_step : int
        Transformer calls a step (2 with sequential classifier-free guidance).
    pixels_per_token : int
        Pixels of a token's side: 16 for every supported model (8 in the VAE, 2 in packing).

    Returns
    -------
    Estimate
        `summary()` for people, `to_dict()` for programs.

    Raises
    ------
    ConfigError
        If a number is out of range, a size holds no token, the budget depends on measured attention (`TopP`), or
        ``layers`` is not one factor an attention layer.
    BudgetError
        If the budget asks for more tokens than the references have.
    IncompatibleError
        If ``execute="cache"`` or "both" meets a model whose attention is not known.
    UnsupportedModelError
        If no adapter serves the transformer, or its adapter does not say which Linear runs on which rows.

    Notes
    -----
    FLOPs agree with `torch.utils.flop_counter.FlopCounterMode` on the meta device. Text encoder and VAE are not in it.
    On a transformer whose processors keep the references' keys and values (that of a Klein-KV pipeline)
    ``execute="cache"`` and "both" mean that cache; the dense work is then still that of the pipeline without one
    (plain Klein).

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> from sparse_ref_attn.adapters.geometries import named_model
    >>> e = estimate(named_model("kontext"), references=[(1024, 1024)], config=sra.SparseContext(0.10))
    >>> e.tokens[0], round(e.flop_ratio, 2)
    (410, 2.01)
    """
    config = ReCAST() if config is None else config
    if not isinstance(config, SparseRef):
        raise ConfigError(f"config must be a SparseRef (ReCAST(...), SparseContext(...)), got {type(config).__name__}")
    counts = {"steps": steps, "batch": batch, "calls_per_step": calls_per_step, "pixels_per_token": pixels_per_token}
    for name, value in (counts | {"text_tokens": text_tokens}).items():
        least = 0 if name == "text_tokens" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an int of at least {least}, got {value!r}")
    if config.budget.needs_mass:
        raise ConfigError(
            "an estimate needs a budget that is known before the run, and this one is read off the attention that the "
            f"run will measure: {config.budget}. Estimate its bounds instead, for example with schedules.Constant"
        )
    adapter = adapter_for(transformer)
    shape = adapter.shape(transformer)
    check_cache(config, adapter, transformer)
    cached = isinstance(config.execute, Cache)
    kept_by_model = cached and adapter.cache is not None and adapter.cache.kept_by(transformer)
    layout = _layout(references, output, text_tokens, pixels_per_token)
    if config.from_block or config.profile == "in_flight":
        adapter.check_depth(transformer)
    probing = Probing.of(config, [site.kind for site in adapter.sites(transformer)])
    if probing.probes:
        adapter.check_measurable(transformer)
    line = Timeline.of(config, probing, stores=cached and not kept_by_model)
    clock = partial(Clock.uniform, steps=steps)
    line.check(steps)
    planned = line.planned(steps, Budgeting.of(config, layout, clock(0)), clock)
    kinds, kept = ["cached" if step.reads else step.kind for step in planned], [step.kept for step in planned]
    from_block = [step.from_block for step in planned]
    tokens = [_rows(layout, step) for step in planned]
    full = StepTokens.of(layout)
    given = all(gives_lse(site.processor) for site in adapter.sites(transformer))
    scoring = _scoring(shape, probing, line, layout, batch, steps, given)
    kept_sparse = [n for n, kind in zip(kept, kinds, strict=True) if kind in ("sparse", "cached")]
    if kept_by_model:
        kinds, kept, tokens = with_cache(config, layout, kinds, kept)
    sparse_steps = [t for t, kind in zip(tokens, kinds, strict=True) if kind in ("sparse", "cached")]
    most = max(sparse_steps, key=lambda t: t.joint + t.dropped, default=full)
    branches = calls_per_step if line.stores else 1  # each branch of guidance stores its own
    room = branches * room_bytes(shape, text_tokens + full.generation, batch) if cached and kept_sparse else 0
    kept_kv = branches * reference_kv_bytes(shape, max(kept_sparse, default=full.references), batch)
    held_kv = kept_kv
    if line.stores and (probing.probes or config.cache_rows == "all"):  # every row, before the ranking is known
        held_kv = branches * reference_kv_bytes(shape, full.references, batch)

    def peak(step: StepTokens) -> Memory:
        memory = step_memory(shape, step, batch)
        return replace(memory, reference_kv=held_kv + room) if cached else memory

    return Estimate(
        model=f"{adapter.name} ({shape.name})",
        config=config.describe(),
        text=text_tokens,
        generation=full.generation,
        references=layout.sizes,
        kinds=tuple(kinds),
        tokens=tuple(kept),
        from_block=tuple(from_block),
        blocks=len(shape.leading),
        dense=run_flops(shape, [full] * steps, batch, calls_per_step),
        sparse=run_work(config, shape, tokens, batch, calls_per_step, scoring),
        scoring=scoring,
        memory=RunMemory(
            dense=step_memory(shape, full, batch),
            sparse=peak(max(tokens, key=lambda t: t.joint + t.dropped)),
            sparse_step=peak(most),
            dense_reference_kv=branches * reference_kv_bytes(shape, full.references, batch),
            sparse_reference_kv=kept_kv,
            room=room,
        ),
        notes=tuple(_notes(config)),
    )


def _rows(layout: TokenLayout, step: PlannedStep) -> StepTokens:
    """The rows of a planned step."""
    if step.reads:
        return StepTokens(layout.text, layout.generation[1], 0, cached=step.kept)
    return StepTokens.of(layout, step.kept, step.from_block)


def _notes(config: SparseRef) -> list[str]:
    notes = []
    if isinstance(config.refresh, Drift):
        notes.append("Drift refreshes as the run finds: counted as rarely as the age of the stored allows")
    if config.guard is not None:
        notes.append("without the guard: a run whose attention is near uniform keeps more, up to every token")
    if config.clock == "sigma":
        notes.append('clock="sigma" needs the scheduler of a pipeline: counted on the uniform clock instead')
    return notes


def _layout(references: Sequence[Size], output: Size, text: int, cell: int) -> TokenLayout:
    height, width = _grid("output", output, cell)
    at = generation = height * width
    found = []
    if not isinstance(references, Sequence):
        raise ConfigError(f"references must be a list of (width, height) in pixels, got {references!r}")
    for i, size in enumerate(references):
        grid = _grid(f"reference {i}", size, cell)
        found.append(Reference(at, grid[0] * grid[1], grid))
        at += grid[0] * grid[1]
    if not found:
        raise ConfigError("an estimate needs at least one reference's (width, height), got none")
    return TokenLayout(at, text, (0, generation), tuple(found))


def _grid(name: str, size: Size, cell: int) -> tuple[int, int]:
    """Height and width in tokens."""
    ok = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) and side >= cell for side in size)
    if not ok:
        raise ConfigError(f"the size of {name} must be (width, height) in pixels, each at least {cell}, got {size!r}")
    return size[1] // cell, size[0] // cell


def _scoring(
    shape: ModelShape, probing: Probing, line: Timeline, layout: TokenLayout, batch: int, steps: int, lse_given: bool
) -> Flops:
    """Work of measuring attention: probes that share queries and stride are measured once a block.

    `lse_given`: the model's own attention gives its LSE. That of a step on stored keys is of other keys.
    """
    measured = {
        (step, block, probe.queries, probe.query_stride)
        for probe in probing.probes
        for step in (*probe.steps, *(step for step in range(steps) if line.reranks(step)))
        for block in probing.where[probe]
    }
    keys = layout.text + layout.rows
    total = Flops(0, 0)
    for step, _, queries, stride in measured:
        stored = line.reads and line.reranks(step)
        parts = [(size, size) for size in layout.sizes]
        if queries == "generation":
            parts = [(layout.generation[1], layout.reference_tokens)]
        for rows, own in parts:
            read = own if lse_given and not stored else keys
            total = total + scoring_flops(shape, -(-rows // stride), read, 1, batch)
    return total


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"

"""What a run will cost, before it runs: FLOPs, tokens and memory from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..checks import is_int
from ..config import SparseRef
from ..cost import (
    Memory,
    ModelShape,
    StepTokens,
    reference_kv_bytes,
    room_bytes,
    run_flops,
    step_memory,
)
from ..errors import ConfigError
from ..execution import Cache
from ..hooks.compiled import unwrap
from ..hooks.diffusers import gives_lse
from ..models import adapter_for, edit_facts
from ..patching import transformer_of
from ..patching.execution.joint import check_cache
from ..patching.trained import isolation_of
from ..presets import configuration
from ..refresh import Drift
from ..types import Reference, TokenLayout
from .cache import kept_whole, run_work
from .planned import PlannedRun
from .result import Estimate, RunMemory
from .scoring import scoring_of
from .tile_memory import held_by_tiles

__all__ = ["estimate", "estimate_of", "token_side"]

Size = tuple[int, int]


def estimate(
    pipe: Any,
    config: SparseRef | float | str | None = None,
    *,
    references: Sequence[Size] = ((1024, 1024),),
    output: Size = (1024, 1024),
    text_tokens: int = 512,
    steps: int | None = None,
    batch: int = 1,
    calls_per_step: int = 1,
    pixels_per_token: int | None = None,
) -> Estimate:
    """Tokens, FLOPs and memory of a run, from sizes alone: nothing is run and no weight is read.

    Parameters
    ----------
    pipe : diffusers pipeline or torch.nn.Module
        A pipeline with a supported transformer, or the transformer itself, on any device, the meta device included
        (`models.named_model`).
    config : SparseRef, str, float or int, optional
        As for `patch`; default "balanced".
    references : sequence of (int, int)
        (width, height) of each reference in pixels, as the pipeline encodes it. Default one of 1024 x 1024.
    output : (int, int)
        (width, height) of the image being made, in pixels.
    text_tokens : int
        Tokens of the prompt, padding included.
    steps : int, optional
        Denoising steps, >= 1. Default those of the pipeline's call (4 of a distilled model); 28 of a transformer.
    batch : int
        Items of one transformer call (2 with batched classifier-free guidance).
    calls_per_step : int
        Transformer calls a step (2 with sequential classifier-free guidance).
    pixels_per_token : int, optional
        Pixels of a token's side. Default that of the pipeline: 16 for most published models (8 in the VAE and 2 in
        packing, or 16 in the VAE), and of a transformer; LTX-2's is 32.

    Returns
    -------
    Estimate
        `summary()` for people, `to_dict()` for programs.

    Raises
    ------
    ConfigError
        If a number is out of range, a size holds no token, the budget depends on measured attention (`TopP`),
        ``layers`` is not one factor an attention layer, or the pipeline takes one reference and gets several.
    BudgetError
        If the budget asks for more tokens than the references have.
    IncompatibleError
        If ``execute="cache"`` or "both" meets a model whose attention is not known.
    UnsupportedModelError
        If there is no transformer, no adapter serves it, or its adapter does not say which Linear runs on which rows.

    Notes
    -----
    FLOPs agree with `torch.utils.flop_counter.FlopCounterMode` on the meta device. Text encoders and VAE are not in it,
    neither their work nor their memory.
    On a transformer whose processors keep the references' keys and values (that of a Klein-KV pipeline)
    ``execute="cache"`` and "both" mean that cache; the dense work is then still that of the pipeline without one
    (plain Klein). The dense work of models that always run their references whole is that of their own cache:
    of GLM-Image with the calls before the steps, whose guided calls see no reference and are not among
    `calls_per_step`, of Qwen-Image-2.1 with the first step, its references counted as standing before the words.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> from sparse_ref_attn.models import named_model
    >>> e = estimate(named_model("kontext"), sra.SparseContext(0.10))
    >>> e.tokens[0], round(e.flop_ratio, 2)
    (410, 2.01)
    """
    config, transformer = configuration(config), unwrap(transformer_of(pipe))
    facts = edit_facts(pipe)
    if facts is not None and isinstance(references, Sequence):
        facts.check_references(len(references))
    if steps is None:
        steps = 28 if facts is None else facts.steps(getattr(pipe.config, "is_distilled", None))
    if pixels_per_token is None:
        pixels_per_token = token_side(pipe)
    return estimate_of(
        transformer, None, config, references=references, output=output, text_tokens=text_tokens,
        steps=steps, batch=batch, calls_per_step=calls_per_step, pixels_per_token=pixels_per_token,
    )  # fmt: skip


def token_side(pipe: Any) -> int:
    """Pixels along the side of a reference token."""
    facts = edit_facts(pipe)
    return (2 if facts is None else facts.packed) * getattr(pipe, "vae_scale_factor", 8)


def estimate_of(
    transformer: nn.Module,
    shape: ModelShape | None,
    config: SparseRef,
    *,
    references: Sequence[Size],
    output: Size,
    steps: int,
    text_tokens: int = 512,
    batch: int = 1,
    calls_per_step: int = 1,
    pixels_per_token: int = 16,
) -> Estimate:
    """`estimate` of a transformer, whose shape is given where many are asked for: reading it takes most of the time."""
    counts = {"steps": steps, "batch": batch, "calls_per_step": calls_per_step, "pixels_per_token": pixels_per_token}
    for name, value in (counts | {"text_tokens": text_tokens}).items():
        least = 0 if name == "text_tokens" else 1
        if not is_int(value, least):
            raise ConfigError(f"{name} must be an int of at least {least}, got {value!r}")
    if config.budget.needs_mass:
        raise ConfigError(
            "an estimate needs a budget that is known before the run, and this one is read off the attention that the "
            f"run will measure: {config.budget}. Estimate its bounds instead, for example with schedules.Constant"
        )
    adapter = adapter_for(transformer)
    shape = adapter.shape(transformer) if shape is None else shape
    check_cache(config, adapter, transformer)
    layout = _layout(references, output, text_tokens, pixels_per_token)
    if adapter.text_apart:
        layout = replace(layout, text=0, apart=text_tokens)
    if config.from_block or config.profile == "in_flight":
        adapter.check_depth(transformer)
    sites = adapter.sites(transformer)
    kept_by_model = adapter.cache is not None and adapter.cache.kept_by(transformer)
    isolation = isolation_of(config.execute, transformer, adapter)
    before, whole, layout = kept_whole(adapter, transformer, layout)
    run = PlannedRun.of(config, sites, layout, steps, kept_by_model, isolation is not None, whole, before)
    passes = [] if isolation is None else [StepTokens(0, 0, len(own)) for own in isolation.passes(layout.sizes)]
    passes += [StepTokens(0, 0, size) for size in layout.sizes if before]
    probing, kinds, tokens = run.probing, run.kinds, run.tokens
    if probing.probes:
        adapter.check_measurable(transformer)
    full, total = StepTokens.of(layout), layout.reference_tokens
    dense = [StepTokens.reading(layout, total) if whole else full] * steps
    if whole and not before:
        dense[0] = StepTokens.storing(layout, total)
    lse_given = all(gives_lse(site.processor) for site in sites)
    scoring = scoring_of(shape, run, layout, batch, calls_per_step, lse_given)
    cached = whole or isinstance(config.execute, Cache)
    sparse_steps = [t for t, kind in zip(tokens, kinds, strict=True) if kind in ("sparse", "cached")]
    most = max(sparse_steps, key=lambda t: t.joint + t.dropped, default=full)
    # each branch of guidance stores its own, but references that run by themselves are the same for all
    branches = calls_per_step if run.line.stores and not passes else 1
    tiles = held_by_tiles(config, shape, run, layout, _grid("output", output, pixels_per_token), batch)
    tiles = None if tiles is None else branches * tiles
    room = 0
    if cached and run.stored and tiles is None:
        room = branches * room_bytes(shape, layout.text + full.generation, batch)
    kept_kv = branches * reference_kv_bytes(shape, max(run.stored, default=total), batch)
    held_kv = kept_kv
    every = whole or config.per == "tile" or (run.line.stores and (probing.probes or config.cache_rows == "all"))
    if every:  # every row, at least before the ranking is known
        held_kv = branches * reference_kv_bytes(shape, total, batch)

    def peak(step: StepTokens) -> Memory:
        memory = step_memory(shape, step, batch)
        return replace(memory, reference_kv=held_kv + room + (tiles or 0)) if cached else memory

    return Estimate(
        model=f"{adapter.name} ({shape.name})",
        config=config.describe(),
        text=text_tokens,
        generation=full.generation,
        references=layout.sizes,
        kinds=tuple(kinds),
        tokens=tuple(run.kept),
        from_block=tuple(run.from_block),
        blocks=len(shape.leading),
        dense=run_flops(shape, dense, batch, calls_per_step) + run_flops(shape, passes if before else [], batch),
        sparse=run_work(config, shape, tokens, batch, calls_per_step, scoring) + run_flops(shape, passes, batch),
        scoring=scoring,
        memory=RunMemory(
            dense=step_memory(shape, dense[0], batch),
            sparse=peak(max([*tokens, *passes], key=lambda t: t.joint + t.dropped)),
            sparse_step=peak(most),
            dense_reference_kv=branches * reference_kv_bytes(shape, total, batch),
            sparse_reference_kv=kept_kv,
            room=room,
            tiles=tiles,
        ),
        notes=tuple(_notes(config)),
    )


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
    if any(side % cell for side in output):
        raise ConfigError(f"the size of output must be multiples of {cell} pixels, got {output[0]} x {output[1]}")
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
    ok = isinstance(size, Sequence) and len(size) == 2 and all(is_int(side, cell) for side in size)
    if not ok:
        raise ConfigError(f"the size of {name} must be (width, height) in pixels, each at least {cell}, got {size!r}")
    return size[1] // cell, size[0] // cell

"""Runs of one case: the gate that a method must pass, the runs that are timed, the rows that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.cost import Flops, ModelShape, StepTokens, bound_seconds, run_flops
from sparse_ref_attn.eval.clock import time_call, timed
from sparse_ref_attn.eval.counted import counted_work, sites_of
from sparse_ref_attn.functional import attention_mass
from sparse_ref_attn.models import adapter_for, named_model
from sparse_ref_attn.record import RunRecord
from sparse_ref_attn.reference_cache import Tiling
from sparse_ref_attn.report.work import recorded_flops

from .memory import peak_of
from .methods import METHODS, Method, method_of
from .shapes import PipelineCase
from .step_caches import on

__all__ = ["Runs", "about", "gate", "rows_of", "run_once", "run_untimed", "running"]


@dataclass
class Runs:
    """What one method's runs took, in seconds, one entry a round, and what they held."""

    total: list[float] = field(default_factory=list)
    transformer: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    record: RunRecord | None = None
    peak_bytes: int = 0
    counted: Flops | None = None


@contextmanager
def running(pipe: Any, method: Method, steps: int) -> Iterator[sra.PatchHandle | None]:
    """Inside, calls of `steps` steps run by `method`; gives the patch, if it is one."""
    with on(method.step_cache, pipe, steps):
        if method.config is None:
            yield None
        else:
            with sra.patched(pipe, method.config) as handle:
                yield handle


def run_once(pipe: Any, call: Callable[..., Any], case: PipelineCase, method: Method, runs: Runs) -> None:
    """One timed call of one method; its images must be finite."""
    device = pipe.transformer.device
    if method == METHODS["dense"]:
        images, times = time_call(call, pipe.transformer, sites_of(pipe.transformer))
        seconds = times.whole
        runs.transformer.append(times.transformer)
        runs.attention.append(times.attention or 0.0)
    else:
        steps = method.steps or case.steps
        with running(pipe, method, steps) as handle:
            seconds, images = timed(lambda: call(steps=steps), device)
            runs.record = None if handle is None else handle.record
    if not np.isfinite(images).all():
        raise RuntimeError("every run must give finite images, got NaN or infinity")
    runs.total.append(seconds)


def run_untimed(pipe: Any, call: Callable[..., Any], case: PipelineCase, method: Method, runs: Runs) -> None:
    """One call that is not timed: the most memory it held, and under a step cache the work it did.

    On a CPU two steps are enough for the memory, and recording it is slow.
    """
    device = pipe.transformer.device
    whole = method.steps or case.steps
    steps = whole if device.type == "cuda" or method.step_cache else min(2, whole)
    with running(pipe, method, steps):
        if method.step_cache:
            with counted_work(pipe.transformer) as work:
                runs.peak_bytes = peak_of(lambda: call(steps=steps), device)
            runs.counted = work()
        else:
            runs.peak_bytes = peak_of(lambda: call(steps=steps), device)


def gate(pipe: Any, call: Callable[..., Any], case: PipelineCase, methods: Sequence[Method]) -> bool:
    """At 256 x 256 or less: keeping every token, timing the dense run, and taking a method off change no bit.

    Every method gives finite images, and a sparse one other images than the dense run.
    """
    stores = any(method.config is not None and method.config.execute.name == "cache" for method in methods)
    small: dict[str, int] = {"steps": 3 if stores else 2, "side": min(256, case.side)}  # 3: one reads what is stored
    dense = call(**small)
    same = [time_call(lambda: call(**small), pipe.transformer, sites_of(pipe.transformer))[0]]
    with sra.patched(pipe, sra.SparseRef(select="grid", budget=1.0)):
        same.append(call(**small))
    for method in methods:
        with running(pipe, method, small["steps"]):
            images = call(**small)
        if not np.isfinite(images).all() or (method.config is not None and np.array_equal(images, dense)):
            return False
        same.append(call(**small))
    return all(np.array_equal(images, dense) for images in same)


def about(case: PipelineCase, transformer: Any) -> dict[str, Any]:
    """The columns that say which call was timed."""
    config = transformer.config
    return {
        "model": case.model,
        "width": config.num_attention_heads * config.attention_head_dim,
        "depth": f"{config.num_layers}+{getattr(config, 'num_single_layers', 0)}",
        "steps": case.steps,
        "references": case.references,
        "side": case.side,
        "batch": case.batch,
    }


def rows_of(case: PipelineCase, runs: Mapping[str, Runs], transformer: Any) -> list[dict[str, Any]]:
    """One row a method, dense first, each with its bound: the dense run's times, scaled by the method's work."""
    shape = adapter_for(transformer).shape(transformer)
    dense, tokens = runs["dense"], (case.side // 16) ** 2
    references = case.references * tokens
    full = run_flops(shape, [StepTokens(case.text_tokens, tokens, references)] * case.steps, case.batch)
    attention, inside = median(dense.attention), median(dense.transformer)
    fixed = median(t - x for t, x in zip(dense.total, dense.transformer, strict=True))
    weights = sum(p.numel() * p.element_size() for p in transformer.parameters())
    rows = []
    for name, own in runs.items():
        method = method_of(name)
        seconds = median(own.total)
        row = about(case, transformer) | {"method": name, "rounds": len(own.total), "gate": "pass"}
        row |= {"seconds_median": seconds, "seconds_min": min(own.total), "seconds_max": max(own.total)}
        row |= {"speedup": median(dense.total) / seconds, "peak_mb": (weights + own.peak_bytes) / 1e6}
        row |= {"kept_mean": references, "host_ms_per_step": 0.0, "cache_mb": 0.0, "dense_cache_mb": 0.0}
        work, scoring = full, 0.0
        if own.counted is not None:
            work = own.counted
        elif own.record is not None:
            recorded = recorded_flops(shape, own.record)
            scoring = scoring_seconds(own.record, shape, next(transformer.parameters()))
            work = Flops(recorded.matmul, recorded.attention - int(own.record.scoring_flops))
            row["flop_ratio"] = full.total / recorded.total
        elif method.steps is not None:
            work = Flops(full.matmul * method.steps // case.steps, full.attention * method.steps // case.steps)
        elif method.cached:
            split = StepTokens(case.text_tokens, tokens, references, split=True)
            read = StepTokens(case.text_tokens, tokens, 0, cached=references)
            work = run_flops(shape, [split] + [read] * (case.steps - 1), case.batch)
        row.setdefault("flop_ratio", full.total / work.total)
        bound = seconds
        if name != "dense":
            bound = bound_seconds(full, work, attention, inside - attention, fixed + scoring)
        row |= {"bound_seconds": bound, "measured_over_bound": bound / seconds, "scoring_seconds": scoring}
        if own.record is not None:
            row |= recorded_columns(own.record)
        row["full_flop_ratio"] = full_ratio(case, name)
        row |= {"dense_attention_seconds": attention, "dense_remaining_seconds": inside - attention}
        rows.append(row | {"fixed_seconds": fixed})
    return rows


def recorded_columns(record: RunRecord) -> dict[str, float]:
    """What the library itself noted of a run: tokens and host time a step, reference K/V held."""
    steps = record.steps
    return {
        "kept_mean": record.mean_tokens,
        "host_ms_per_step": 1000 * sum(step.host_seconds for step in steps) / len(steps),
        "cache_mb": max(step.cache_bytes for step in steps) / 1e6,
        "dense_cache_mb": record.dense_cache_bytes / 1e6,
    }


def full_ratio(case: PipelineCase, name: str) -> float | str:
    """The FLOP ratio of the model at its published depth; empty where `estimate` does not know the method."""
    method, size = method_of(name), (case.side, case.side)
    if name == "dense" or method.steps is not None:
        return case.steps / (method.steps or case.steps)
    if method.config is None or method.step_cache:
        return ""
    model = _published(f"{case.model}-kv" if method.cached else case.model)
    return sra.estimate(
        model, references=[size] * case.references, output=size, text_tokens=case.text_tokens,
        steps=case.steps, config=method.config,
    ).flop_ratio  # fmt: skip


@cache
def _published(model: str) -> torch.nn.Module:
    return named_model(model)


def scoring_seconds(record: RunRecord, shape: ModelShape, like: torch.Tensor) -> float:
    """What measuring the run's attention takes by itself: `attention_mass` at its shapes, best of three.

    It runs in float32 whatever the model's dtype, so its work is not charged at the rate of the model's attention.
    It is given an LSE where the run was, which the FLOPs that were charged tell.
    """
    if not record.attention:
        return 0.0
    layout, tiles = record.layout, None
    calls = len(record.attention)
    if record.tiles is not None:  # every layer of the full steps that a cached one follows
        last = max(step.index for step in record.steps if step.kind == "cached")
        calls = shape.attention_layers * sum(
            step.calls for step in record.steps if step.kind != "cached" and step.index < last
        )
        known = Tiling(0, record.tiles.grid, record.tiles.side).offsets(1)
        tiles = torch.tensor(known, dtype=torch.int32, device=like.device)
    first = layout.text + layout.references[0].start
    heads = (shape.heads, shape.head_dim)
    q = torch.randn(record.batch, layout.generation[1], *heads, device=like.device).to(like.dtype)
    k = torch.randn(record.batch, layout.text + layout.rows, *heads, device=like.device).to(like.dtype)
    span = (first, first + layout.reference_tokens)
    items = len(range(record.batch)[layout.conditional or slice(None)])
    alone = 2.0 * items * q[0].numel() * k.shape[1] * calls
    lse = None if record.scoring_flops >= alone else q.new_zeros(q.shape[0], q.shape[2], q.shape[1]).float()
    best = min(
        timed(lambda: attention_mass(q, k, span, lse=lse, tiles=tiles, reduce_heads=tiles is not None), like.device)[0]
        for _ in range(3)
    )
    return best * calls

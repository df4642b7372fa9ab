"""Whole ``pipe()`` calls, dense and sparse, beside the bound that the dense run's own times set.

    python -m benchmarks.bench_pipeline             # every case, rows appended to benchmarks/results/
    python -m benchmarks.bench_pipeline --quick     # a minute: shows that it runs

All methods run in turn, for several rounds, in one process. The bound is

    attention seconds x attention FLOPs ratio + remaining transformer seconds x matrix-product FLOPs ratio
    + seconds of measuring the attention + seconds outside the transformer

with the seconds of the dense runs and the FLOPs of the sparse run, dense profiling steps included. Measuring the
attention (`attention_mass`, float32) is charged what it takes by itself at the same shapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.base import adapter_for
from sparse_ref_attn.adapters.flops import dense_flops, recorded_flops
from sparse_ref_attn.cost import Flops, bound_seconds
from sparse_ref_attn.functional import attention_mass
from sparse_ref_attn.record import RunRecord

from . import results
from .dense_times import DenseTimes, timed
from .memory import keep_freed_memory, page_faults, peak_memory, reserve
from .pipelines import build, caller
from .shapes import CASES, QUICK, PipelineCase

METHODS: dict[str, sra.SparseRef | None] = {
    "dense": None,
    "edges 25%": sra.SparseContext(0.25, "edges"),
    "edges 10%": sra.SparseContext(0.10, "edges"),
    "edges 5%": sra.SparseContext(0.05, "edges"),
    "ReCAST": sra.ReCAST(task="subject"),
    "ReCAST in flight": sra.ReCAST(task="subject", profile="in_flight"),
    "downscale 25%": sra.SparseRef(select=sra.Downscale(), budget=0.25),
    "downscale 10%": sra.SparseRef(select=sra.Downscale(), budget=0.10),
    "ToMe 25%": sra.SparseRef(select=sra.ToMe(), budget=0.25),
}
DEFAULT = ["edges 25%", "edges 10%", "edges 5%", "ReCAST", "downscale 25%"]


@dataclass
class Runs:
    """What one method's runs took, in seconds, one entry a round."""

    total: list[float] = field(default_factory=list)
    transformer: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    record: RunRecord | None = None


def run_once(pipe: Any, call: Callable[[], Any], config: sra.SparseRef | None, runs: Runs) -> None:
    """One timed call of one method; its images must be finite."""
    device = pipe.transformer.device
    if config is None:
        with DenseTimes(pipe.transformer) as times:
            seconds, images = timed(call, device)
        transformer, attention = times.seconds()
        runs.attention.append(attention)
    else:
        with sra.patched(pipe, config) as handle:
            seconds, images = timed(call, device)
            runs.record = handle.record
        transformer = sum(step.seconds() for step in runs.record.steps)
    if not np.isfinite(images).all():
        raise RuntimeError("every run must give finite images, got NaN or infinity")
    runs.total.append(seconds)
    runs.transformer.append(transformer)


def passes_gate(pipe: Any, call: Callable[..., Any], configs: Sequence[sra.SparseRef]) -> bool:
    """At 256 x 256: keeping every token, timing the dense run, and taking the patch off change no bit."""
    small: dict[str, int] = {"steps": 2, "side": 256}
    dense = call(**small)
    with DenseTimes(pipe.transformer):
        same = [call(**small)]
    for config in configs:
        with sra.patched(pipe, sra.SparseRef(select="grid", budget=1.0)):
            same.append(call(**small))
        with sra.patched(pipe, config):
            sparse = call(**small)
        if not np.isfinite(sparse).all() or np.array_equal(sparse, dense):
            return False
    same.append(call(**small))
    return all(np.array_equal(images, dense) for images in same)


def tap_seconds(pipe: Any, call: Callable[..., Any]) -> float:
    """What timing one attention call costs by itself, from smallest runs with and without it."""
    times: dict[bool, list[float]] = {True: [], False: []}
    calls = len(adapter_for(pipe.transformer).sites(pipe.transformer))
    for _ in range(5):
        times[False].append(timed(lambda: call(steps=1, side=128), pipe.transformer.device)[0])
        with DenseTimes(pipe.transformer):
            times[True].append(timed(lambda: call(steps=1, side=128), pipe.transformer.device)[0])
    return max(0.0, min(times[True]) - min(times[False])) / max(1, calls)


def scoring_seconds(record: RunRecord, heads: int, head_dim: int, like: torch.Tensor) -> float:
    """What measuring the run's attention takes by itself: `attention_mass` at its shapes, best of three.

    It runs in float32 whatever the model's dtype, so its work is not charged at the rate of the model's attention.
    """
    if not record.attention:
        return 0.0
    layout = record.layout
    first = layout.text + layout.references[0].start
    q = torch.randn(record.batch, layout.generation[1], heads, head_dim, device=like.device).to(like.dtype)
    k = torch.randn(record.batch, layout.text + layout.rows, heads, head_dim, device=like.device).to(like.dtype)
    span = (first, first + layout.reference_tokens)
    best = min(timed(lambda: attention_mass(q, k, span), like.device)[0] for _ in range(3))
    return best * len(record.attention)


def rows_of(
    case: PipelineCase,
    runs: dict[str, Runs],
    shape: Any,
    like: torch.Tensor,
    common: dict[str, Any],
    dense_work: Flops | None = None,
) -> list[dict[str, Any]]:
    """One row a method, with the bound. `dense_work` where the dense run is another pipeline's than the method's."""
    dense = runs["dense"]
    attention, transformer = median(dense.attention), median(dense.transformer)
    fixed = median(t - x for t, x in zip(dense.total, dense.transformer, strict=True))
    rows = []
    for name, own in runs.items():
        row = common | {"references": case.references, "method": name, "rounds": len(own.total)}
        row |= {"seconds_median": median(own.total), "seconds_min": min(own.total), "seconds_max": max(own.total)}
        row["speedup"] = median(dense.total) / row["seconds_median"]
        if own.record is None:
            row |= {"kept_mean": case.references * (case.side // 16) ** 2, "flop_ratio": 1.0}
            row |= {"bound_seconds": row["seconds_median"], "measured_over_bound": 1.0, "host_ms_per_step": 0.0}
            row["scoring_seconds"] = 0.0
        else:
            full, kept = dense_work or dense_flops(shape, own.record), recorded_flops(shape, own.record)
            scoring = scoring_seconds(own.record, shape.heads, shape.head_dim, like)
            own_work = Flops(kept.matmul, kept.attention - int(own.record.scoring_flops))
            bound = bound_seconds(full, own_work, attention, transformer - attention, fixed + scoring)
            row["scoring_seconds"] = scoring
            steps = own.record.steps
            row["kept_mean"] = sum(own.record.mean_kept(step) for step in steps) / len(steps)
            row |= {"flop_ratio": full.total / kept.total, "bound_seconds": bound}
            row["measured_over_bound"] = bound / row["seconds_median"]
            row["host_ms_per_step"] = 1000 * sum(step.host_seconds for step in steps) / len(steps)
        row |= {"dense_attention_seconds": attention, "dense_remaining_seconds": transformer - attention}
        rows.append(row | {"fixed_seconds": fixed})
    return rows


def bench(case: PipelineCase, methods: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one case and return its rows."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    pipe = build(case, device, dtype, options.real_depth)
    call = caller(pipe, case)
    adapter = adapter_for(pipe.transformer)
    shape = adapter.shape(pipe.transformer)
    configs = {name: METHODS[name] for name in ["dense", *methods] if name in METHODS}
    chosen = [config for config in configs.values() if config is not None]
    if not passes_gate(pipe, call, chosen):
        raise RuntimeError(f"the correctness gate of {case} is red: no speed-up is reported")
    tap = tap_seconds(pipe, call)
    held = peak_memory()
    call(steps=1)  # warm-up at the largest size
    if device.type == "cpu":
        reserve(3 * (peak_memory() - held) // 2)
    runs = {name: Runs() for name in configs}
    for number in range(case.rounds):
        for name, config in configs.items():
            before = page_faults()
            run_once(pipe, call, config, runs[name])
            faults = page_faults() - before
            print(f"  round {number + 1}, {name}: {runs[name].total[-1]:.2f} s, {faults} page faults", flush=True)
    share = tap * len(adapter.sites(pipe.transformer)) * case.steps / median(runs["dense"].total)
    print(f"  timing the dense runs' attention took {share:.3%} of them")
    for name, own in runs.items():
        if own.record is not None:
            first, *others = [1000 * step.host_seconds for step in own.record.steps]
            print(
                f"  host time of {name}: {first:.1f} ms at the first step, {median(others or [0]):.2f} ms at the others"
            )
    config = pipe.transformer.config
    common = results.environment(device) | {
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "model": case.model,
        "width": config.num_attention_heads * config.attention_head_dim,
        "depth": f"{config.num_layers}+{config.num_single_layers}",
        "steps": case.steps,
        "gate": "pass",
    }
    return rows_of(case, runs, shape, next(pipe.transformer.parameters()), common)


def faster_dtype(device: torch.device) -> str:
    """bfloat16, unless this CPU multiplies it no faster than float32 (that is, emulates it)."""
    if device.type != "cpu":
        return "bfloat16"
    times = {}
    for name in ("bfloat16", "float32"):
        x, w = (torch.randn(n, 3072).to(getattr(torch, name)) for n in (1024, 3072))
        times[name] = min(timed(lambda x=x, w=w: x @ w.T, device)[0] for _ in range(4))
    print(", ".join(f"{name} {2 * 1024 * 3072**2 / t / 1e9:.0f} GFLOP/s" for name, t in times.items()))
    return min(times, key=lambda name: times[name])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_pipeline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=sorted({case.model for case in CASES}), help="only this model")
    parser.add_argument("--references", type=int, help="only cases with this many references")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=DEFAULT, metavar="NAME")
    parser.add_argument("--rounds", type=int, help="runs of every method instead of the case's")
    parser.add_argument("--steps", type=int, help="denoising steps instead of the case's")
    parser.add_argument("--real-depth", action="store_true", help="every block of the published model")
    parser.add_argument("--quick", action="store_true", help="256 tokens an image: shows that it runs; writes no rows")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (not yet proved on a card)")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: the faster")
    parser.add_argument("--out", type=Path, help="CSV file that rows are appended to; default benchmarks/results/")
    options = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    if options.device == "cpu" and not keep_freed_memory():
        print("the allocator returns memory between operations: large dense operations pay for page faults")
    if options.dtype == "auto":
        options.dtype = faster_dtype(torch.device(options.device))
    out = options.out or Path(__file__).parent / "results" / f"pipeline_{torch.device(options.device).type}.csv"
    for case in QUICK if options.quick else CASES:
        if options.model not in (None, case.model) or options.references not in (None, case.references):
            continue
        case = replace(case, steps=options.steps or case.steps, rounds=options.rounds or case.rounds)
        print(f"{case.model}, {case.references} reference(s), {options.dtype} on {options.device}", flush=True)
        rows = bench(case, options.methods, options)
        print(results.table(rows), flush=True)
        if not options.quick:
            results.append(rows, out)


if __name__ == "__main__":
    main()

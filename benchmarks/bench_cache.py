"""Dropping tokens, caching references, and both: whole ``pipe()`` calls of Klein and Klein-KV beside their bound.

    python -m benchmarks.bench_cache                # every case, rows appended to benchmarks/results/cache_cpu.csv
    python -m benchmarks.bench_cache --quick        # a minute: shows that it runs
    python -m benchmarks.bench_cache --device cuda --real-depth      # the same on a card, not yet proved on one

One transformer of real width serves two pipelines: the dense run and "tokens" are `Flux2KleinPipeline`, "cache" and
"both" are `Flux2KleinKVPipeline`. The bound is that of `bench_pipeline`: the dense run's attention seconds and its
other transformer seconds, each scaled by its own FLOPs, and its seconds outside the transformer. Beside it stands the
FLOP ratio of the whole model, whose share of attention the cut depth changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.base import adapter_for
from sparse_ref_attn.adapters.geometries import named_model
from sparse_ref_attn.cost import StepTokens, run_flops

from . import results
from .bench_pipeline import Runs, faster_dtype, passes_gate, rows_of, run_once
from .memory import keep_freed_memory, peak_memory, reserve
from .pipelines import build, caller
from .shapes import CACHE_CASES, CACHE_QUICK, TEXT_TOKENS, PipelineCase

KEPT = (0.50, 0.25, 0.10)
COLUMNS = (*results.COLUMNS, "full_flop_ratio", "cache_mb", "dense_cache_mb")


def configs() -> dict[str, sra.SparseRef | None]:
    """The methods by name: dense, and each execution at each share."""
    made: dict[str, sra.SparseRef | None] = {"dense": None}
    for execute in ("tokens", "cache", "both"):
        for keep in KEPT:
            made[f"{execute} {keep:.0%}"] = sra.SparseRef("edges", keep, execute)
    return made


def with_cache(pipe: Any) -> Any:
    """Klein-KV around the components of a Klein pipeline; its attention processors do as before without a cache."""
    made = diffusers.Flux2KleinKVPipeline(
        scheduler=pipe.scheduler, vae=pipe.vae, text_encoder=None, tokenizer=None, transformer=pipe.transformer
    )
    made.set_progress_bar_config(disable=True)
    return made


def bench(case: PipelineCase, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one case and return its rows."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    plain = build(case, device, dtype, options.real_depth)
    cached = with_cache(plain)
    calls: dict[Any, Callable[..., Any]] = {pipe: caller(pipe, case) for pipe in (plain, cached)}
    methods = configs()
    pipes = {name: plain if name.split()[0] in ("dense", "tokens") else cached for name in methods}
    for pipe, call in calls.items():
        own = [methods[name] for name in methods if name.endswith("25%") and pipes[name] is pipe]
        if not passes_gate(pipe, call, [config for config in own if config is not None]):
            raise RuntimeError(f"the correctness gate of {case} is red: no speed-up is reported")
    held = peak_memory()
    calls[plain](steps=1)  # warm-up at the largest size
    if device.type == "cpu":
        reserve(3 * (peak_memory() - held) // 2)
    runs = {name: Runs() for name in methods}
    for number in range(case.rounds):
        for name, config in methods.items():
            run_once(pipes[name], calls[pipes[name]], config, runs[name])
            print(f"  round {number + 1}, {name}: {runs[name].total[-1]:.2f} s", flush=True)
    shape = adapter_for(plain.transformer).shape(plain.transformer)
    tokens = (case.side // 16) ** 2
    dense = run_flops(shape, [StepTokens(TEXT_TOKENS, tokens, case.references * tokens)] * case.steps)
    config = plain.transformer.config
    common = results.environment(device) | {
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "model": case.model,
        "width": config.num_attention_heads * config.attention_head_dim,
        "depth": f"{config.num_layers}+{config.num_single_layers}",
        "steps": case.steps,
        "gate": "pass",
    }
    rows = rows_of(case, runs, shape, next(plain.transformer.parameters()), common, dense)
    full = named_model(case.model)
    for row in rows:
        method, record = methods[row["method"]], runs[row["method"]].record
        if method is None or record is None:
            row |= {"full_flop_ratio": 1.0, "cache_mb": 0.0, "dense_cache_mb": 0.0}
            continue
        size = (case.side, case.side)
        whole = sra.estimate(
            full, references=[size] * case.references, output=size, text_tokens=TEXT_TOKENS, steps=case.steps,
            config=method,
        )  # fmt: skip
        row["full_flop_ratio"] = whole.flop_ratio
        row["cache_mb"] = max(step.cache_bytes for step in record.steps) / 1e6
        row["dense_cache_mb"] = record.dense_cache_bytes / 1e6
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a method: seconds, FLOP ratios, speed-up beside the bound's, and the K/V held."""
    dense = rows[0]
    lines = [
        f"{'method':<12}{'kept':>7}{'seconds':>9}{'FLOP ratio':>12}{'full model':>12}{'bound':>8}{'speed-up':>10}"
        f"{'of bound':>10}{'K/V MB':>9}{'dense MB':>10}"
    ]
    for row in rows:
        lines.append(
            f"{row['method']:<12}{row['kept_mean']:>7.0f}{row['seconds_median']:>9.2f}{row['flop_ratio']:>12.2f}"
            f"{row['full_flop_ratio']:>12.2f}{dense['seconds_median'] / row['bound_seconds']:>8.2f}"
            f"{row['speedup']:>10.2f}{row['measured_over_bound']:>10.2f}{row['cache_mb']:>9.1f}"
            f"{row['dense_cache_mb']:>10.1f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_cache", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--references", type=int, help="only the case with this many references")
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
    out = options.out or Path(__file__).parent / "results" / f"cache_{torch.device(options.device).type}.csv"
    for case in CACHE_QUICK if options.quick else CACHE_CASES:
        if options.references not in (None, case.references):
            continue
        case = replace(case, steps=options.steps or case.steps, rounds=options.rounds or case.rounds)
        print(f"{case.model}, {case.references} reference(s), {options.dtype} on {options.device}", flush=True)
        rows = bench(case, options)
        worst = median(row["measured_over_bound"] for row in rows[1:])
        print(f"{table(rows)}\nmedian of measured over bound: {worst:.2f}", flush=True)
        if not options.quick:
            results.append(rows, out, COLUMNS)


if __name__ == "__main__":
    main()

"""One transformer call, and one of its blocks, at the shapes of real models: dense and with tokens dropped.

    python -m benchmarks steps             # FLUX.1 Kontext and Klein 9B, rows appended to results/steps_<device>.csv
    python -m benchmarks steps --models flux2-dev qwen-image-edit --references 1 2 --quick

A step is ``transformer(...)`` with what a pipeline gave it, patched or not; "profile" is a dense step whose attention
is measured. A block is the first of its kind, with what it was given in that step. All methods run in turn, round after
round. The bound is the dense run's time in attention and its other time, each scaled by the work that was counted
(`work.counted_work`); for "profile" with the time that measuring the attention takes by itself on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from statistics import median
from typing import Any

import torch

import sparse_ref_attn as sra
from sparse_ref_attn.cost import bound_seconds
from sparse_ref_attn.eval.clock import time_call, timed
from sparse_ref_attn.eval.counted import counted_work, sites_of
from sparse_ref_attn.models import MODELS, adapter_for

from .memory import peak_memory, peak_of, reserve
from .options import Output, add_cuts, add_shared, prepare
from .random_pipelines import build, caller, transformer_of
from .results import ENVIRONMENT
from .runs import about, scoring_seconds
from .shapes import PipelineCase, changed

__all__ = ["COLUMNS", "add_arguments", "bench", "run"]

COLUMNS = (
    *ENVIRONMENT, "level", "model", "width", "depth", "references", "side", "batch", "method", "kept", "ms_median",
    "ms_min", "ms_max", "rounds", "flop_ratio", "bound_ms", "measured_over_bound", "speedup", "peak_mb",
)  # fmt: skip

Call = Callable[[], Any]


def first_blocks(transformer: Any) -> dict[str, tuple[torch.nn.Module, int]]:
    """The first block of each kind, and which of the transformer's attentions is its own."""
    found: dict[str, tuple[torch.nn.Module, int]] = {}
    for i, block in enumerate(adapter_for(transformer).blocks(transformer)):
        found.setdefault(f"{block.kind} block", (block.module, i))
    return found


def given(module: torch.nn.Module, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first call of `module` inside `call`."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return seen[0]


@contextmanager
def first_step(transformer: Any, kwargs: dict[str, Any], config: sra.SparseRef | None) -> Iterator[Call]:
    """Inside, what it gives is the first step of a run; it may be called once."""
    if config is None:
        yield lambda: transformer(**kwargs)
        return
    with sra.patched(transformer, config) as handle:
        handle.begin(steps=2)
        handle.step(0)
        yield lambda: transformer(**kwargs)


def bench(
    case: PipelineCase, keeps: list[float], device: torch.device, dtype: torch.dtype
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the step and of each kind of block, by level."""
    pipe = build(case, device, dtype)
    transformer = pipe.transformer
    call = caller(pipe, case)
    held = peak_memory()
    _, kwargs = given(transformer, lambda: call(steps=1))
    if device.type == "cpu":
        reserve(3 * (peak_memory() - held) // 2)
    configs = {f"grid {keep:.0%}": sra.SparseRef("grid", keep) for keep in keeps}
    methods: dict[str, sra.SparseRef | None] = {"dense": None, **configs, "profile": sra.SparseRef("mass", keeps[0])}
    with sra.patched(transformer, methods["profile"]) as handle:
        handle.begin(steps=2)
        handle.step(0)
        transformer(**kwargs)
        shape = adapter_for(transformer).shape(transformer)
        scoring = scoring_seconds(handle.record, shape, next(transformer.parameters()))
    levels: dict[str, tuple[torch.nn.Module, int | None, dict[str, Callable[[], Any]]]] = {}
    levels["step"] = (
        transformer, None,
        {name: (lambda config=config: first_step(transformer, kwargs, config)) for name, config in methods.items()},
    )  # fmt: skip
    for level, (block, site) in first_blocks(transformer).items():
        of_block = {}
        for name in ("dense", *configs):
            with first_step(transformer, kwargs, methods[name]) as step:
                args, named = given(block, step)
            of_block[name] = lambda block=block, args=args, named=named: _plain(lambda: block(*args, **named))
        levels[level] = (block, site, of_block)
    kept = {"dense": 1.0, "profile": 1.0} | {f"grid {keep:.0%}": keep for keep in keeps}
    tokens = case.references * (case.side // 16) ** 2
    rows = {}
    for level, (module, site, runs) in levels.items():
        found = measured(transformer, module, site, runs, case.rounds, {"profile": scoring})
        which = call_of(case, transformer) | {"level": level}
        rows[level] = [which | {"kept": round(kept[row["method"]] * tokens)} | row for row in found]
    return rows


def call_of(case: PipelineCase, transformer: Any) -> dict[str, Any]:
    """The columns that say which call was timed; it is one step."""
    return {name: value for name, value in about(case, transformer).items() if name != "steps"}


@contextmanager
def _plain(call: Call) -> Iterator[Call]:
    yield call


def measured(
    transformer: Any, module: torch.nn.Module, site: int | None, runs: dict[str, Callable[[], Any]], rounds: int,
    extra: dict[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a method, dense first; `site` is the one attention of `module`, None all of them."""
    device = transformer.device
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    attention: list[float] = []
    for turn in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            with run() as call:
                if name == "dense":
                    _, times = time_call(call, module, sites_of(transformer, site))
                    took, inside = times.whole, times.attention or 0.0
                else:
                    took = timed(call, device)[0]
            if turn:
                seconds[name].append(took)
            if turn and name == "dense":
                attention.append(inside)
    work, peaks = {}, {}
    for name, run in runs.items():
        with run() as call, counted_work(transformer, module, site) as count:
            peaks[name] = peak_of(call, device)
        work[name] = count()
    dense, inside = median(seconds["dense"]), median(attention)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    rows = []
    for name, took in seconds.items():
        bound = bound_seconds(work["dense"], work[name], inside, max(0.0, dense - inside), extra.get(name, 0.0))
        rows.append(
            {
                "method": name, "ms_median": 1000 * median(took), "ms_min": 1000 * min(took), "rounds": len(took),
                "ms_max": 1000 * max(took), "flop_ratio": work["dense"].total / work[name].total,
                "bound_ms": 1000 * bound, "measured_over_bound": bound / median(took),
                "speedup": dense / median(took), "peak_mb": (weights + peaks[name]) / 1e6,
            }
        )  # fmt: skip
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models and references, and what to change in the case."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["kontext", "klein-9b"], metavar="NAME")
    parser.add_argument("--references", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--kept", nargs="+", type=float, default=[0.25, 0.10, 0.05], metavar="SHARE")
    add_cuts(parser)
    add_shared(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Every model and number of references; the exit code."""
    device = prepare(options)
    output = Output(options, "steps", COLUMNS)
    wanted = [PipelineCase(m, n, 1, 1, steps=1, rounds=3) for m, n in product(options.models, options.references)]
    for case in changed(wanted, options):
        if output.has(**call_of(case, transformer_of(case))):
            continue
        print(f"{case}, {options.dtype} on {options.device}", flush=True)
        rows = bench(case, options.kept, device, getattr(torch, options.dtype))
        for level, found in rows.items():
            print(f"  {level:<28}{'ms':>10}{'FLOP ratio':>12}{'bound':>10}{'of bound':>10}{'peak MB':>10}")
            for row in found:
                print(
                    f"  {row['method']:<28}{row['ms_median']:>10.2f}{row['flop_ratio']:>12.2f}{row['bound_ms']:>10.2f}"
                    f"{row['measured_over_bound']:>10.2f}{row['peak_mb']:>10.1f}"
                )
        output.add([row for found in rows.values() for row in found])
    return output.verdict()

"""Whole ``pipe()`` calls, dense and by each method, beside the bound that the dense run's own times set.

    python -m benchmarks pipeline                         # the suite of that name, rows appended to benchmarks/results/
    python -m benchmarks pipeline --suite cache --quick   # a minute: shows that it runs

All methods run in turn, for several rounds, in one process. The bound is

    attention seconds x attention FLOPs ratio + remaining transformer seconds x matrix-product FLOPs ratio
    + seconds of measuring the attention + seconds outside the transformer

with the seconds of the dense runs and the FLOPs of the method's run, dense profiling steps included. Measuring the
attention (`attention_mass`, float32) is charged what it takes by itself at the same shapes. The work of a step cache,
which decides while it runs, is counted in a run that is not timed. "fewer steps" are dense runs in as many steps as
take no longer than each method did.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval.clock import time_call, timed
from sparse_ref_attn.eval.counted import sites_of

from . import results
from .memory import page_faults, peak_memory, reserve
from .methods import FEWER, METHODS, Method
from .op_methods import REFUSALS, told
from .options import Output, add_cuts, add_shared, prepare
from .random_pipelines import build, caller, transformer_of, with_cache
from .runs import Runs, about, gate, rows_of, run_once, run_untimed, running
from .shapes import SUITES, PipelineCase, changed

__all__ = ["TAPS", "add_arguments", "bench", "run", "table"]

TAPS = 5
"""Smallest runs with and without timing of the attention, from whose least times its cost is told."""


def bench(case: PipelineCase, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Run one case and return its rows; methods that the model cannot run are named and left out."""
    own = build(case, device, dtype)
    pipes = {False: own}
    if case.model.startswith("klein") and any(name != FEWER and METHODS[name].cached for name in names):
        pipes[True] = with_cache(own)
    calls = {cached: caller(pipe, case) for cached, pipe in pipes.items()}
    named = [name for name in dict.fromkeys(["dense", *names]) if name != FEWER]
    methods = able(case, {name: METHODS[name] for name in named}, pipes, calls)
    for cached, pipe in pipes.items():
        others = [method for method in methods.values() if method.cached == cached and method != METHODS["dense"]]
        if not gate(pipe, calls[cached], case, others):
            raise RuntimeError(f"the correctness gate of {case} is red: no speed-up is reported")
    tap = tap_seconds(own, calls[False])
    held = peak_memory()
    calls[False](steps=1)  # warm-up at the largest size
    if device.type == "cpu":
        reserve(3 * (peak_memory() - held) // 2)
    runs = {name: Runs() for name in methods}
    for number in range(case.rounds):
        for name, method in methods.items():
            before = page_faults()
            run_once(pipes[method.cached], calls[method.cached], case, method, runs[name])
            faults = page_faults() - before
            print(f"  round {number + 1}, {name}: {runs[name].total[-1]:.2f} s, {faults} page faults", flush=True)
    if FEWER in names:
        methods |= fewer_steps(case, own, calls[False], runs)
    for name, method in methods.items():
        run_untimed(pipes[method.cached], calls[method.cached], case, method, runs[name])
    share = tap * len(sites_of(own.transformer)) * case.steps / median(runs["dense"].total)
    print(f"  timing the dense runs' attention took {share:.3%} of them")
    return rows_of(case, runs, own.transformer)


def fewer_steps(case: PipelineCase, pipe: Any, call: Callable[..., Any], runs: dict[str, Runs]) -> dict[str, Method]:
    """For each method that was timed, the dense run in the most steps that take no longer, timed; `runs` takes them.

    What the dense run's own time promises is held to the clock: a run that takes longer runs in a step less.
    """
    dense, found = runs["dense"], {}
    fixed = median(t - x for t, x in zip(dense.total, dense.transformer, strict=True))
    each = median(dense.transformer) / case.steps
    for seconds in sorted({median(own.total) for name, own in runs.items() if name != "dense"}, reverse=True):
        for steps in range(min(case.steps - 1, int((seconds - fixed) / each)), 0, -1):
            name, method = f"dense, {steps} steps", Method(steps=steps)
            if name not in runs:
                runs[name], found[name] = Runs(), method
                for number in range(case.rounds):
                    run_once(pipe, call, case, method, runs[name])
                    print(f"  round {number + 1}, {name}: {runs[name].total[-1]:.2f} s", flush=True)
            if median(runs[name].total) <= seconds:
                break
    return found


def able(
    case: PipelineCase, methods: dict[str, Method], pipes: dict[bool, Any], calls: dict[bool, Callable[..., Any]]
) -> dict[str, Method]:
    """The methods that this model, and what is installed, can run; the others are named with their reason."""
    out = {}
    for name, method in methods.items():
        if method.cached not in pipes:
            print(f"  {name}: {case.model} has no pipeline that keeps its references' keys and values")
            continue
        if method.step_cache:
            pipe = pipes[method.cached]
            try:
                with running(pipe, method, 2):
                    calls[method.cached](steps=2, side=128)
            except REFUSALS as error:
                print(f"  {name}: {told(error)}")
                continue
        out[name] = method
    return out


def tap_seconds(pipe: Any, call: Callable[..., Any]) -> float:
    """What timing one attention call costs by itself, from smallest runs with and without it."""
    times: dict[bool, list[float]] = {True: [], False: []}
    sites = sites_of(pipe.transformer)

    def small() -> Any:
        return call(steps=1, side=128)

    for _ in range(TAPS):
        times[False].append(timed(small, pipe.transformer.device)[0])
        times[True].append(time_call(small, pipe.transformer, sites)[1].whole)
    return max(0.0, min(times[True]) - min(times[False])) / max(1, len(sites))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The methods of one case as text, each beside its bound."""
    dense = rows[0]
    lines = [
        f"dense: {dense['dense_attention_seconds']:.2f} s attention, {dense['dense_remaining_seconds']:.2f} s other "
        f"transformer, {dense['fixed_seconds']:.2f} s outside it",
        f"{'method':<28}{'kept':>7}{'seconds':>9}  {'min-max':<14}{'FLOP ratio':>11}{'bound':>8}{'speed-up':>10}"
        f"{'of bound':>10}{'host ms/step':>14}{'peak MB':>10}{'K/V MB':>9}",
    ]
    for row in rows:
        spread = f"{row['seconds_min']:.2f}-{row['seconds_max']:.2f}"
        lines.append(
            f"{row['method']:<28}{row['kept_mean']:>7.0f}{row['seconds_median']:>9.2f}  {spread:<14}"
            f"{row['flop_ratio']:>11.2f}{dense['seconds_median'] / row['bound_seconds']:>8.2f}{row['speedup']:>10.2f}"
            f"{row['measured_over_bound']:>10.2f}{row['host_ms_per_step']:>14.2f}{row['peak_mb']:>10.1f}"
            f"{row['cache_mb']:>9.1f}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite, and what to change in its cases."""
    parser.add_argument(
        "--suite", choices=SUITES, default="pipeline",
        help="; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items()),
    )  # fmt: skip
    parser.add_argument("--model", help="only the suite's cases of this model")
    parser.add_argument("--references", type=int, metavar="N", help="only cases with this many references")
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, FEWER], metavar="NAME",
        help=f"instead of the suite's: {', '.join([*METHODS, FEWER])}".replace("%", "%%"),
    )  # fmt: skip
    add_cuts(parser)
    add_shared(parser)
    parser.set_defaults(run=run)


def cases(options: argparse.Namespace) -> list[PipelineCase]:
    """The suite's cases as the options change them.

    Raises
    ------
    ConfigError
        If the suite has no such case.
    """
    suite = SUITES[options.suite].cases
    found = [
        case for case in suite if options.model in (None, case.model) and options.references in (None, case.references)
    ]
    if not found:
        had = ", ".join(sorted({f"{case.model} with {case.references}" for case in suite}))
        raise ConfigError(f"--model and --references must name a case of {options.suite} ({had}), got none")
    return changed(found, options)


def run(options: argparse.Namespace) -> int:
    """Every case of the suite; the exit code."""
    device = prepare(options)
    suite = SUITES[options.suite]
    output = Output(options, suite.stem, results.COLUMNS)
    for case in cases(options):
        if output.has(**about(case, transformer_of(case))):
            continue
        print(f"{case}, {options.dtype} on {options.device}", flush=True)
        rows = bench(case, options.methods or suite.methods, device, getattr(torch, options.dtype))
        worst = median(row["measured_over_bound"] for row in rows[1:] or rows)
        print(f"{table(rows)}\nmedian of measured over bound: {worst:.2f}", flush=True)
        output.add(rows)
    return output.verdict()

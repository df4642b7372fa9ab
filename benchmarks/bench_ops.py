"""gather_attention and attention_mass at the shapes of real models, beside what one would do without them.

    python -m benchmarks ops                            # this machine's CPU, rows appended to results/
    python -m benchmarks ops --quick                    # seconds: shows that it runs, writes no rows
    python -m benchmarks ops --models klein-9b qwen-edit --heads 4      # cut to what a CPU does in minutes
    python -m benchmarks ops --device cuda --dtype bfloat16 --references 1 2 4 --backward

A method is timed only after its gate: no further from float64 than twice the error of plain PyTorch in the same
precision, on 64 queries (attention) or one head (mass). All methods run in turn, round after round, each after a write
that clears the cache. Rivals that are not installed, or cannot do the call, are named with their reason and skipped.

Columns of a row: where and when (`results.ENVIRONMENT`), the call (model, heads, references, kept
share, kept tokens, op, direction), the method, milliseconds (median, min, max, rounds), TFLOP/s, ``of_bound`` (the time
of dense attention scaled by the method's FLOPs, over its time) and ``of_hand`` (index_select and SDPA by hand, for
query tiles SDPA under a mask, or a stored softmax for the mass, over this time).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

import torch

from .op_calls import Attention, Mass, TileMass
from .op_methods import HAND, MASKED, REFUSALS, Method, attention_methods, gated, mass_methods, tile_methods, told
from .op_rivals import by_hand
from .op_shapes import MODELS, quick
from .op_timing import measure
from .options import Output, add_shared, prepare
from .results import ENVIRONMENT
from .tile_calls import Tiled

__all__ = ["COLUMNS", "TILES", "add_arguments", "run"]

COLUMNS = (
    *ENVIRONMENT, "model", "heads", "references", "share", "kept", "op",
    "direction", "method", "ms_median", "ms_min", "ms_max", "rounds", "tflops", "of_bound", "of_hand",
)  # fmt: skip
TILES = (16, 64)  # queries: patches of 4 x 4 and 8 x 8 tokens
TILED = 0.125  # of the references, that each query tile keeps


def attention_rows(call: Attention, rounds: int, backward: bool) -> list[dict[str, Any]]:
    """Forward, or forward and backward, of every method that passes its gate."""
    passed = gated(attention_methods(call))

    def with_backward(method: Method) -> Callable[[], object]:
        return lambda: torch.autograd.grad(method.run(), call.leaves, call.grad)

    runs: dict[str, Callable[[], object]] = {name: method.run for name, method in passed.items()}
    if backward:
        runs = {}
        for name, method in passed.items():
            run = with_backward(method)
            try:
                with torch.enable_grad():
                    run()
            except REFUSALS as error:
                print(f"  {name}, backward: {told(error)}")
            else:
                runs[name] = run
    with torch.set_grad_enabled(backward):
        times = measure(runs, call.device, rounds)
    factor = 3.5 if backward else 1.0
    flops = {name: factor * passed[name].flops for name in times}
    return _rows(times, flops, "dense", HAND[call.op])


def tile_rows(call: Tiled, rounds: int) -> list[dict[str, Any]]:
    """Forward of every method that passes its gate."""
    passed = gated(tile_methods(call))
    with torch.no_grad():
        times = measure({name: method.run for name, method in passed.items()}, call.device, rounds)
    return _rows(times, {name: passed[name].flops for name in times}, "dense", MASKED)


def mass_rows(call: Mass, dense: Attention, rounds: int) -> list[dict[str, Any]]:
    """attention_mass of all reference tokens, by every method that passes its gate; `dense` sets the bound."""
    methods = mass_methods(call, [TileMass(dense, size) for size in TILES])
    passed = {"dense": Method(by_hand(dense), None, dense.flops)} | gated(methods)
    with torch.no_grad():
        times = measure({name: method.run for name, method in passed.items()}, call.device, rounds)
    flops = {name: method.flops for name, method in passed.items()}
    return _rows(times, flops, "dense", HAND[call.op])[1:]


def _rows(times: dict[str, list[float]], flops: dict[str, float], dense: str, hand: str) -> list[dict[str, Any]]:
    """One row for each method; `dense` and `hand` name those that the others are compared with."""
    rows = []
    for name, took in times.items():
        ms = median(took)
        rows.append(
            {
                "method": name, "ms_median": ms, "ms_min": min(took), "ms_max": max(took), "rounds": len(took),
                "tflops": flops[name] / ms / 1e9,
                "of_bound": median(times[dense]) * flops[name] / flops[dense] / ms,
                "of_hand": median(times[hand]) / ms,
            }
        )  # fmt: skip
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shapes, and how they are cut."""
    parser.add_argument("--models", nargs="+", default=["kontext"], choices=list(MODELS))
    parser.add_argument("--heads", type=int, help="only so many of the model's heads; the rows say so")
    parser.add_argument("--references", nargs="+", type=int, default=[1])
    parser.add_argument("--kept", nargs="+", type=float, default=[0.05, 0.25, 1.0])
    parser.add_argument("--tiles", nargs="*", type=int, default=[4, 8], help="sides of query tiles, in tokens")
    parser.add_argument("--backward", action="store_true", help="time forward and backward together too")
    add_shared(parser, dtype="float32")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Every shape that the options ask for; the exit code."""
    device = prepare(options)
    dtype, rounds = getattr(torch, options.dtype), options.rounds or 5
    output = Output(options, "ops", COLUMNS)
    for model, references in product(options.models, options.references):
        shape = replace(MODELS[model], references=references)
        shape = quick(shape) if options.quick else shape
        shape = replace(shape, heads=min(options.heads or shape.heads, shape.heads))
        for share in options.kept:
            call = Attention(shape, share, device, dtype)
            for backward in (False, True)[: 1 + options.backward]:
                which = about(call, share, backward)
                if not output.has(**which):
                    print(f"{model}, {shape.heads} heads, {references} references, {share:.0%} kept", flush=True)
                    _add(output, which, attention_rows(call, rounds, backward))
        for side in options.tiles:
            tiled = Tiled(Attention(shape, TILED, device, dtype), side)
            which = about(tiled, TILED)
            if not output.has(**which):
                print(f"{model}, {shape.heads} heads, {references} references, {TILED:.1%} kept, {side} x {side} tiles")
                _add(output, which, tile_rows(tiled, rounds))
        dense = Attention(shape, 1.0, device, dtype).dense()
        mass = Mass(dense)
        which = about(mass, 1.0)
        if not output.has(**which):
            print(f"{model}, {shape.heads} heads, {references} references, attention_mass", flush=True)
            _add(output, which, mass_rows(mass, dense, rounds))
    return output.verdict()


def about(call: Attention | Tiled | Mass, share: float, backward: bool = False) -> dict[str, Any]:
    """The columns that say which call was timed."""
    shape = call.shape
    return {
        "model": shape.model, "heads": shape.heads, "references": shape.references, "share": f"{share:.4g}",
        "kept": call.kept, "op": call.op, "direction": "forward + backward" if backward else "forward",
    }  # fmt: skip


def _add(output: Output, which: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    found = [which | row for row in rows]
    _show(found)
    output.add(found)


def _show(rows: list[dict[str, Any]]) -> None:
    print(f"  {rows[0]['direction']:<30}{'ms':>10}{'TFLOP/s':>10}{'of bound':>10}{'of hand':>10}")
    for row in rows:
        print(
            f"  {row['method']:<30}{row['ms_median']:>10.2f}{row['tflops']:>10.3f}{row['of_bound']:>10.2f}"
            f"{row['of_hand']:>10.2f}"
        )

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
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ref_attn.errors import ConfigError

from .op_calls import Attention, Mass, TileMass
from .op_rivals import ATTENTION, DENSE, MASS, Rival, by_hand, mass_by_hand
from .op_shapes import MODELS, quick
from .options import Output, add_shared, prepare
from .results import ENVIRONMENT
from .tile_calls import Tiled

__all__ = [
    "COLUMNS", "REFUSALS", "TILES", "Method", "add_arguments", "attention_methods", "mass_methods", "measure",
    "refused", "run", "told",
]  # fmt: skip

COLUMNS = (
    *ENVIRONMENT, "model", "heads", "references", "share", "kept", "op",
    "direction", "method", "ms_median", "ms_min", "ms_max", "rounds", "tflops", "of_bound", "of_hand",
)  # fmt: skip
TILES = (16, 64)  # queries: patches of 4 x 4 and 8 x 8 tokens
HAND = {"gather_attention": "index_select + sdpa", "attention_mass": "softmax by hand"}
MASKED = "sdpa with a mask"  # by hand, where query tiles select
TILED = 0.125  # of the references, that each query tile keeps


class Method(NamedTuple):
    """What is timed, the call whose truth it must meet (None: it computes something else), its forward FLOPs."""

    run: Callable[[], Tensor]
    call: Attention | Tiled | Mass | None
    flops: float


def attention_methods(call: Attention) -> dict[str, Method]:
    """Dense attention, ours, and our rivals."""
    dense = call.dense()
    backends = ("auto", "sdpa", "triton", "cuda", *(("flash", "flex") if call.device.type == "cuda" else ()))
    out = {"dense": Method(by_hand(dense), dense, dense.flops)}
    out |= _rivals(DENSE, dense)
    out[HAND[call.op]] = Method(by_hand(call), call, call.flops)
    for backend in backends:
        out[f"ours ({backend})"] = Method(lambda backend=backend: call.ours(backend), call, call.flops)
    return out | _rivals(ATTENTION, call)


def tile_methods(call: Tiled) -> dict[str, Method]:
    """Dense attention, attention under a mask that says the same, and ours."""
    dense = call.call
    out = {"dense": Method(by_hand(dense), dense, dense.flops), MASKED: Method(call.by_hand, call, dense.flops)}
    for backend in ("auto", "sdpa", "triton"):
        out[f"ours ({backend})"] = Method(lambda backend=backend: call.ours(backend), call, call.flops)
    return out


def mass_methods(call: Mass, tiled: Sequence[TileMass]) -> dict[str, Method]:
    """Ours, alone and with the LSE of the step's own attention, pooled and per tile, and our rivals."""
    out = {HAND[call.op]: Method(mass_by_hand(call), call, call.flops)}
    for backend in ("auto", "triton", "cuda"):
        out[f"ours ({backend})"] = Method(lambda backend=backend: call.ours(backend), call, call.flops)
    lse = call.lse()
    if lse is None:
        print("  ours, LSE given: PyTorch's attention says none here")
    else:
        for backend in ("auto", "triton", "cuda"):
            run = partial(call.ours, backend, lse=lse)
            out[f"ours ({backend}), LSE given"] = Method(run, call, call.flops_with_lse)
        for tiles, backend in product(tiled, ("auto", "triton")):
            run = partial(tiles.ours, backend, lse=lse)
            out[f"ours ({backend}), LSE given, tiles of {tiles.size}"] = Method(run, tiles, call.flops_with_lse)
    out["ours (auto), every 4th query"] = Method(lambda: call.ours("auto", 4), None, call.flops / 4)
    return out | _rivals(MASS, call)


def _rivals(rivals: dict[str, Rival], call: Attention | Mass) -> dict[str, Method]:
    out = {}
    for name, rival in rivals.items():
        why = rival.reasons(call.device)
        if why is not None:
            print(f"  {name}: {why}")
            continue
        try:
            out[name] = Method(rival.prepare(call), call, call.flops)
        except REFUSALS as error:
            print(f"  {name}: {told(error)}")
    return out


# What a package that cannot do a call, or was built for another PyTorch, raises.
REFUSALS = (ConfigError, RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError, AssertionError)


def told(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def refused(method: Method, plain: Tensor | None) -> str | None:
    """Why a method is not timed: its gate."""
    try:
        with torch.no_grad():
            out = method.run()
    except REFUSALS as error:
        return told(error)
    if method.call is None or plain is None:
        return None
    got, low = method.call.error(out), method.call.error(plain)
    allowed = 2 * low + 2 * torch.finfo(plain.dtype).eps
    return None if got <= allowed else f"error {got:.2e}, plain PyTorch's allows {allowed:.2e}"


def measure(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run in each round, cold cache, one warm-up round; never two of the same in a row."""
    flush = torch.empty(256 << 20 if device.type == "cuda" else 32 << 20, dtype=torch.uint8, device=device)
    out: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            flush.zero_()
            if device.type == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                stop.record()
                torch.cuda.synchronize(device)
                took = start.elapsed_time(stop)
            else:
                begin = time.perf_counter()
                run()
                took = 1000 * (time.perf_counter() - begin)
            if turn:
                out[name].append(took)
    return out


def gated(methods: dict[str, Method]) -> dict[str, Method]:
    """The methods that pass their gate; the others are named."""
    passed, plains = {}, {}
    with torch.no_grad():
        for name, method in methods.items():
            if method.call is not None and method.call not in plains:
                plains[method.call] = method.call.plain()
            why = refused(method, plains.get(method.call))
            if why is None:
                passed[name] = method
            else:
                print(f"  {name}: {why}")
    return passed


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

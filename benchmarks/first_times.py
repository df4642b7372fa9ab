"""Every row of the ops' targets beside its rivals: graph-replay times, one JSON line each as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ref_attn.functional import attention_mass, gather_attention, pack_rows

from .bench_ops import TILES
from .lines import Lines
from .op_calls import Attention, Mass, TileMass
from .op_methods import REFUSALS, Method, refused, told
from .op_rivals import ATTENTION, MASS, Rival, by_hand
from .op_shapes import MODELS, OpShape
from .replay import replayable, replayed

__all__ = ["NOT_HERE", "ROWS", "times"]

OWN = ("triton", "cuda")
SHARE = 0.25

#: Rows that this command does not time, and why.
NOT_HERE = {
    "whole pipe() call": "needs diffusers: python -m benchmarks card --list has the parts for it",
    "gather_attention, tiles of 128 queries": "the op takes no selection per query tile yet",
    "pack_qkv, modulate": "these ops are not written yet",
}


class Timed(NamedTuple):
    """What is timed, its FLOPs (0: bytes matter), the bytes that it moves, and why its result is not trusted."""

    run: Callable[[], object]
    flops: float = 0.0
    moved: float = 0.0
    gate: Callable[[], str | None] = lambda: None


Methods = Iterator[tuple[str, Callable[[], Timed]]]


def _forward(call: Attention) -> Methods:
    plain = call.plain()

    def gated(run: Callable[[], Tensor]) -> Timed:
        return Timed(run, call.flops, gate=lambda: refused(Method(run, call, call.flops), plain))

    for backend in OWN:
        yield f"ours ({backend})", lambda backend=backend: gated(lambda: call.ours(backend))
    yield "ours (triton), as many keys dense", lambda: gated(_as_dense(call))
    yield "index_select + sdpa", lambda: gated(by_hand(call))
    for name, rival in _compiled_last(ATTENTION):
        yield name, lambda rival=rival: gated(_prepared(rival, call))


def _backward(call: Attention) -> Methods:
    def gradients(run: Callable[[], Tensor]) -> Timed:
        # forward and backward together: a graph takes in what runs on one stream, and a backward runs on its forward's
        return Timed(lambda: torch.autograd.grad(run(), call.leaves, call.grad), 3.5 * call.flops)

    for backend in OWN:
        yield f"ours ({backend})", lambda backend=backend: gradients(lambda: call.ours(backend))
    for name, rival in _compiled_last(ATTENTION):
        if name != "FlashInfer, page_size=1":  # it has no backward
            yield name, lambda rival=rival: gradients(_prepared(rival, call))


def _prefix(call: Attention) -> Methods:
    """The cache in rank order: the kept rows are the bank's first, a view; they need no copy."""
    kept = call.kept
    k_ref, v_ref = call.k_ref.detach()[None, :kept], call.v_ref.detach()[None, :kept]
    q, k, v = (x.detach() for x in (call.q, call.k, call.v))
    joined = [torch.cat(pair, 1).transpose(1, 2) for pair in ((k, k_ref), (v, v_ref))]

    def plain_dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *joined)

    def joins() -> Tensor:
        pairs = ((k, k_ref), (v, v_ref))
        keys, values = (torch.cat(pair, 1).transpose(1, 2) for pair in pairs)
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values)

    for backend in OWN:
        yield (
            f"ours ({backend}), two segments",
            lambda backend=backend: Timed(
                lambda: gather_attention(q, k, v, k2=k_ref, v2=v_ref, backend=backend), call.flops
            ),
        )
    yield "cat + sdpa", lambda: Timed(joins, call.flops)
    yield "plain dense of equal length, sdpa", lambda: Timed(plain_dense, call.flops)


def _mass(call: Attention) -> Methods:
    mass = Mass(call.dense())
    scores = mass.q[0].float().transpose(0, 1) @ mass.keys[0].float().permute(1, 2, 0) * call.shape.channels**-0.5
    lse = scores.logsumexp(-1)[None]
    del scores
    plain = mass.plain()
    flops = 2.0 * mass.q.shape[1] * mass.kept * call.shape.heads * call.shape.channels

    def gated(run: Callable[[], Tensor]) -> Timed:
        return Timed(run, flops, gate=lambda: refused(Method(run, mass, flops), plain))

    for backend in (*OWN, "chunked"):
        yield (
            f"ours ({backend}), lse given",
            lambda backend=backend: gated(
                lambda: attention_mass(mass.q, mass.keys, mass.span, lse=lse, backend=backend)
            ),
        )
    for size in TILES:
        tiled = TileMass(call.dense(), size)
        run = partial(tiled.ours, "triton", lse=lse)
        yield (
            f"ours (triton), lse given, tiles of {size}",
            lambda run=run, tiled=tiled: Timed(
                run, flops, gate=lambda: refused(Method(run, tiled, flops), tiled.plain())
            ),
        )
    for backend in OWN:
        yield f"ours ({backend}), lse computed", lambda backend=backend: gated(lambda: mass.ours(backend))
    for name, rival in MASS.items():
        yield name, lambda rival=rival: gated(_prepared(rival, mass))


def _rows(call: Attention) -> Methods:
    assert call.rows is not None
    rows, width = call.rows, call.shape.heads * call.shape.channels
    x = call.k_ref.detach().flatten(1)[None]
    moved = 2.0 * len(rows) * width * x.element_size()
    for backend in OWN:
        yield (
            f"ours ({backend})",
            lambda backend=backend: Timed(lambda: pack_rows(x, rows, backend=backend), moved=moved),
        )
    yield "index_select", lambda: Timed(lambda: x.index_select(1, rows), moved=moved)
    same = x[:, : len(rows)].contiguous()
    yield "copy of as many bytes", lambda: Timed(same.clone, moved=moved)


ROWS: dict[str, Callable[[Attention], Methods]] = {
    "gather_attention": _forward,
    "attention_mass": _mass,
    "reference cache, rank-prefix": _prefix,
    "pack_rows": _rows,
    "gather_attention, forward + backward": _backward,
}


def times(lines: Lines, device: torch.device, dtype: torch.dtype, shape: OpShape | None, rounds: int) -> int:
    """Every row; 1 where a kernel of ours failed its gate or raised an error, else 0."""
    call = Attention(shape or replace(MODELS["kontext"]), SHARE, device, dtype)
    bad = 0
    for row, why in NOT_HERE.items():
        lines.add(row=row, skipped=why)
    for row, methods in ROWS.items():
        for name, prepare in methods(call):
            which = {"row": row, "method": name}
            try:
                timed = prepare()
                with torch.set_grad_enabled(row.endswith("backward")):
                    why = timed.gate()
                    if why is None:
                        run, graph = replayable(timed.run, device)
                        took = replayed(run, device, rounds)
            except REFUSALS as error:
                why = told(error)
            if why is None:
                lines.add(**which, **_figures(timed, took), graph=graph)
            else:
                lines.add(**which, skipped=why)
                bad += name.startswith("ours (triton)")
    return int(bad > 0)


def _figures(timed: Timed, took: list[float]) -> dict[str, float]:
    ms = median(took)
    rate = {"tflops": round(timed.flops / ms / 1e9, 1)} if timed.flops else {"gb_s": round(timed.moved / ms / 1e6, 1)}
    return {"ms": round(ms, 4), "ms_min": round(min(took), 4), "ms_max": round(max(took), 4), **rate}


def _as_dense(call: Attention) -> Callable[[], Tensor]:
    q, k, v = (x.detach() for x in call.joined())
    return lambda: gather_attention(q, k, v, backend="triton")


def _prepared(rival: Rival, call: Attention | Mass) -> Callable[[], Tensor]:
    why = rival.reasons(call.device)
    if why is not None:
        raise RuntimeError(why)
    return rival.prepare(call)


def _compiled_last(rivals: dict[str, Rival]) -> list[tuple[str, Rival]]:
    """FlexAttention compiles for half a minute: what others say is known before."""
    return sorted(rivals.items(), key=lambda each: "Flex" in each[0])

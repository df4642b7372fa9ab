"""The methods that `bench_ops` times of a call, and the gate that each must pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ref_attn.errors import ConfigError

from .op_calls import Attention, Mass, TileMass
from .op_rivals import ATTENTION, DENSE, MASS, Rival, by_hand, mass_by_hand
from .tile_calls import Tiled

__all__ = [
    "HAND", "MASKED", "REFUSALS", "Method", "attention_methods", "gated", "mass_methods", "refused",
    "tile_methods", "told",
]  # fmt: skip

HAND = {"gather_attention": "index_select + sdpa", "attention_mass": "softmax by hand"}
MASKED = "sdpa with a mask"  # by hand, where query tiles select


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
    for backend in ("auto", "sdpa", "triton", "cpp"):
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

"""How the backends of gather_attention are compared and timed for a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

from ..verdicts import Kind, size_class
from ..verdicts.judge import Compared
from .arguments import Arguments
from .backends import BACKWARD, Call, implementation, reasons
from .gradients import Gradients, Wanted
from .host_offsets import HostOffsets
from .normal_form import normalise
from .reference import gather_attention_reference

__all__ = ["CANDIDATES", "against", "candidates", "kind_of", "sized", "small"]

# What "auto" may take, by device; the order decides a tie: first what is deterministic and never waits for the device.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "cuda", "flash", "sdpa", "flex"),
    "cpu": ("cpp", "sdpa", "flex"),
}
MOST_FLOPS = {"cuda": 4e12, "cpu": 1e9}  # of a timed forward; a problem beyond that is cut in heads, then in queries
BACKWARD_FLOPS = 2.5  # times the forward's
LEAST_TILE = 16  # queries, that have a size class of their own
CELL = 16  # of an item's dense keys of tiles, one mean for so many more


def kind_of(call: Call) -> Kind:
    """The kind of a call."""
    form = "per head" if call.per_head else "gathered" if call.kept else "dense"
    items = max(call.items, 1)
    per_item = -(-call.queries // items), -(-call.keys // items), -(-call.kept // (call.tiles or items))
    size = tuple(size_class(rows) for rows in per_item)
    if call.tiles:
        form = "tiles per head" if call.per_head else "tiles"
        size += (size_class(-(-call.queries // call.tiles), LEAST_TILE),)
    return Kind(
        "gather_attention", form, call.device, call.dtype, call.heads, call.key_heads, call.channels, call.gradients,
        call.items > 1, size,
    )  # fmt: skip


def candidates(kind: Kind) -> Sequence[str]:
    """Names of the backends, in the order that decides a tie."""
    return CANDIDATES.get(kind.device.type, CANDIDATES["cpu"])


def against(kind: Kind, backend: str) -> list[str]:
    """Why a backend cannot do an aligned call of this kind."""
    items = 2 if kind.several else 1
    per_head, tiles = kind.form.endswith("per head"), int(kind.form.startswith("tiles"))
    call = Call(kind.device, kind.dtype, kind.channels, items, per_head, True, kind.gradients, tiles=tiles)
    return reasons(backend, call)


def small(kind: Kind) -> Callable[[str], Iterator[Compared]]:
    """Items of odd lengths beyond one tile, one of them short; rows of the bank out of order."""
    group = 1 if kind.heads <= kind.key_heads else 2
    items = [(133, 70, 37), (1, 3, 66)] if kind.several else [(133, 70, 37)]
    exact = _problem(kind, items, heads=2 * group, key_heads=2, bank=90, dtype=torch.float64)
    exact = _converted(_converted(exact, kind.dtype), torch.float64)  # the truth of the rounded operands
    low = _converted(exact, kind.dtype)
    seeds = (torch.randn(exact.q.shape, generator=_generator(1), dtype=torch.float64).to(exact.q),)
    wanted = _by_reference(exact, seeds[0], kind.gradients)
    plain = _by_reference(low, seeds[0].to(kind.dtype), kind.gradients)

    def run(backend: str) -> Iterator[Compared]:
        out, lse = implementation(backend).forward(low)
        got: dict[str, Tensor | None] = {"out": out, "lse": lse}
        if kind.gradients:
            grads = _differentiate(backend, low, seeds[0].to(kind.dtype), out, lse)
            got |= {f"gradient of {name}": grad for name, grad in grads._asdict().items()}
        for name, truth in wanted.items():
            actual = got[name]
            assert actual is not None, f"must give the {name}, got None"
            yield name, actual, truth, plain[name]

    return run


def sized(kind: Kind) -> Callable[[str], Callable[[], object]]:
    """Items alike, of the class's size; cut in heads and then in queries where that is more than a moment's work."""
    queries, keys, kept = kind.size[:3]
    items = 2 if kind.several else 1
    one_head = 4.0 * items * queries * max(keys + kept, 1) * kind.channels * (1 + BACKWARD_FLOPS * kind.gradients)
    most = MOST_FLOPS.get(kind.device.type, MOST_FLOPS["cpu"])
    group = max(1, kind.heads // max(kind.key_heads, 1))
    key_heads = max(1, min(kind.key_heads, int(most / one_head / group)))
    queries = max(64, min(queries, int(queries * most / (one_head * key_heads * group))))
    a = _problem(kind, [(queries, keys, kept)] * items, group * key_heads, key_heads, max(2 * kept, 1), kind.dtype)
    grad = torch.ones_like(a.q)

    def prepare(backend: str) -> Callable[[], object]:
        def run() -> object:
            out, lse = implementation(backend).forward(a)
            return _differentiate(backend, a, grad, out, lse) if kind.gradients else out

        return run

    return prepare


def _problem(
    kind: Kind, items: Sequence[tuple[int, int, int]], heads: int, key_heads: int, bank: int, dtype: torch.dtype
) -> Arguments:
    """Items of (queries, dense keys, kept rows)."""
    generator, device = _generator(0), kind.device
    queries, keys, kept = [0], [0], [0]
    for lengths in items:
        for offsets, length in zip((queries, keys, kept), lengths, strict=True):
            offsets.append(offsets[-1] + length)

    def normal(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, kind.channels, generator=generator, dtype=torch.float32).to(device, dtype)

    def integers(numbers: object) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).to(device)

    q, k, v = normal(queries[-1], heads), normal(keys[-1], key_heads), normal(keys[-1], key_heads)
    if kind.form == "dense":
        cu = (integers(queries), integers(keys))
        return normalise(q, k, v, None, None, None, None, None, None, *cu, None, False, HostOffsets(queries, keys))
    cu_k: list[Any] = keys
    k2 = v2 = tiles = bias = None
    if kind.form.startswith("tiles"):
        means = [0, *accumulate(-(-(n - m) // CELL) for m, n in pairwise(keys))]
        edges = [list(range(m, n, kind.size[3])) for m, n in pairwise(queries)]
        kept = [0, *accumulate(n - m for each, (m, n) in zip(edges, pairwise(kept), strict=True) for _ in each)]
        k2, v2, cu_k = normal(means[-1], key_heads), normal(means[-1], key_heads), [keys, means]
        tiles = [*chain(*edges), queries[-1]]
        bias = torch.randint(0, CELL, (len(kept) - 1, means[-1]), generator=generator).log().to(device)  # some are -inf
    k_ref, v_ref = normal(bank, key_heads), normal(bank, key_heads)
    selections = key_heads if kind.form.endswith("per head") else 1
    tables = [[row * kept[-1] + at for at in kept] for row in range(selections)]
    rows = [torch.randperm(bank, generator=generator)[: n - m] for _ in tables for m, n in pairwise(kept)]
    return normalise(
        q, k, v, k2, v2, k_ref, v_ref, torch.cat(rows).int().to(device), integers(tables), integers(queries),
        integers(cu_k), None, False, HostOffsets(queries, cu_k, tables, tiles),
        None if tiles is None else integers(tiles), bias,
    )  # fmt: skip


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _converted(a: Arguments, dtype: torch.dtype) -> Arguments:
    floats: dict[str, Any] = {
        n: x.to(dtype)
        for n, x in a._asdict().items()
        if isinstance(x, Tensor) and x.is_floating_point() and n != "bias"
    }
    return a._replace(**floats)


def _by_reference(a: Arguments, grad_out: Tensor, gradients: bool) -> dict[str, Tensor]:
    """Results of the definition in the precision of `a`, with the gradients of ``<out, grad_out>``."""
    names = [n for n in Gradients._fields if getattr(a, n) is not None]
    leaves = {n: getattr(a, n).detach().requires_grad_(gradients) for n in names}
    with torch.set_grad_enabled(gradients):
        out, lse = gather_attention_reference(a._replace(**leaves))
        grads = torch.autograd.grad(out, list(leaves.values()), grad_out) if gradients else ()
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {f"gradient of {name}": grad for name, grad in zip(names, grads, strict=bool(grads))}


def _differentiate(backend: str, a: Arguments, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    backward = implementation(BACKWARD.get(backend, backend)).backward
    return backward(a, grad_out, None, out, lse, Wanted(True, True, a.k_ref is not None))

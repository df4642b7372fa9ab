"""Ragged attention problems and their truth in float64, by a formula that no implementation uses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparse_ref_attn.functional import gather_attention

NAMES = ("q", "k", "v", "k2", "v2", "k_ref", "v_ref")


@dataclass(frozen=True)
class Problem:
    """Operands of one call. Lengths are per part and item: `queries` ((3, 2), (5, 4)) is two items in two parts."""

    operands: dict[str, Tensor]
    layout: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> Problem:
        return replace(
            self,
            operands={n: x.to(device=device, dtype=dtype) for n, x in self.operands.items()},
            layout={n: x.to(device=device) for n, x in self.layout.items()},
        )

    def leaves(self) -> Problem:
        return replace(self, operands={n: x.detach().clone().requires_grad_() for n, x in self.operands.items()})

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
        options = {**self.options, **options}
        return gather_attention(**self.operands, **self.layout, return_lse=True, backend=backend, **options)


def make(
    queries: tuple[tuple[int, ...], ...],
    keys: tuple[tuple[int, ...], ...] | None,
    kept: tuple[int, ...] | tuple[tuple[int, ...], ...] | None,
    bank: int = 0,
    *,
    second: tuple[int, ...] | None = None,
    heads: int = 2,
    key_heads: int | None = None,
    channels: int = 16,
    repeats: bool = False,
    seed: int = 0,
) -> Problem:
    """Random operands. `kept` is per item, or per key head and item; `repeats` draws rows with replacement."""
    generator = torch.Generator().manual_seed(seed)
    key_heads = key_heads or heads

    def normal(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, channels, generator=generator, dtype=torch.float64)

    operands = {"q": normal(sum(map(sum, queries)), heads)}
    layout = {"cu_seqlens_q": tiling(queries)}
    if keys is not None:
        rows = sum(map(sum, keys))
        operands |= {"k": normal(rows, key_heads), "v": normal(rows, key_heads)}
        layout["cu_seqlens_k"] = tiling(keys)
    if second is not None:
        operands |= {"k2": normal(sum(second), key_heads), "v2": normal(sum(second), key_heads)}
        layout["cu_seqlens_k"] = torch.cat([layout["cu_seqlens_k"], tiling((second,))])
    if kept is not None:
        operands |= {"k_ref": normal(bank, key_heads), "v_ref": normal(bank, key_heads)}
        rows = kept if isinstance(kept[0], tuple) else (kept,)
        draws = [
            torch.randint(0, bank, (n,), generator=generator)
            if repeats
            else torch.randperm(bank, generator=generator)[:n]
            for row in rows
            for n in row
        ]
        layout["ref_indices"] = torch.cat(draws).int()
        layout["ref_offsets"] = tiling(rows)
    return Problem(operands, layout)


def grid(channels: int) -> dict[str, Problem]:
    """What every kernel is tried on: sizes on either side of a tile of 32, each way to lay out a call, and nothing."""
    return {
        "one token": make(((1,),), ((1,),), (1,), 1, channels=channels),
        "ragged items, one bank": make(((33, 1, 31),), ((32, 2, 65),), (33, 0, 64), 70, heads=1, channels=channels),
        "text and image rows apart": make(
            ((2, 33), (31, 5)), ((3, 33), (32, 6)), (34, 4), 40, heads=1, channels=channels
        ),
        "two dense tensors, grouped heads": make(
            ((33, 3),), ((3, 33),), (34, 4), 40, second=(32, 2), heads=4, key_heads=2, channels=channels
        ),
        "empty items": make(((3, 0, 33),), ((0, 4, 0),), (0, 2, 33), 40, heads=1, channels=channels),
        "nothing to attend to": make(((3, 33),), ((0, 0),), (0, 0), 5, channels=channels),
        "bank alone": make(((33, 3),), None, (34, 2), 40, channels=channels),
        "dense alone": make(((33, 3),), ((34, 2),), None, channels=channels),
        "rows named twice": make(((33, 3),), ((4, 2),), (35, 34), 9, repeats=True, heads=1, channels=channels),
        "a selection per key head": make(
            ((33, 3),), ((4, 2),), ((33, 0), (1, 34)), 40, heads=4, key_heads=2, channels=channels
        ),
    }


@st.composite
def ragged(draw: st.DrawFn, longest: st.SearchStrategy[int], bank: int, channels: st.SearchStrategy[int]) -> Problem:
    """Any way to lay out a call of at most three items, with parts of any of those lengths."""
    items = draw(st.integers(1, 3))

    def row() -> tuple[int, ...]:
        return tuple(draw(longest) for _ in range(items))

    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    queries = tuple(row() for _ in range(draw(st.integers(1, 2))))
    keys = draw(st.sampled_from([0, 1, 2]))
    second = row() if keys == 1 and draw(st.booleans()) else None
    kept = None
    if keys == 0 or draw(st.booleans()):
        kept = tuple(row() for _ in range(key_heads)) if draw(st.booleans()) else row()
    repeats = draw(st.booleans())
    return make(
        queries, tuple(row() for _ in range(keys)) if keys else None, kept, bank // 5 if repeats else bank,
        second=second, heads=key_heads * group, key_heads=key_heads, channels=draw(channels), repeats=repeats,
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


def tiling(parts: tuple[tuple[int, ...], ...]) -> Tensor:
    """(P, B+1) offsets from lengths; each part continues where the last ended."""
    out, at = [], 0
    for part in parts:
        row = [at]
        for length in part:
            at += length
            row.append(at)
        out.append(row)
    return torch.tensor(out, dtype=torch.int32)


def counts(problem: Problem) -> Tensor:
    """How often each query head attends to each key: (T, H, all keys)."""
    o, layout = problem.operands, problem.layout
    total, heads, _ = o["q"].shape
    sizes = [o[n].shape[0] if n in o else 0 for n in ("k", "k2", "k_ref")]
    key_heads = next(o[n].shape[1] for n in ("k", "k_ref") if n in o)
    out = torch.zeros(total, heads, sum(sizes), dtype=torch.float64)
    item_of = _items(layout["cu_seqlens_q"], total)
    if "k" in o:
        cu = layout["cu_seqlens_k"]
        parts = [(cu[:1], 0, sizes[0]), (cu[1:], sizes[0], sizes[1])] if "k2" in o else [(cu, 0, sizes[0])]
        for part, at, size in parts:
            same = item_of[:, None] == _items(part, size)[None]
            out[:, :, at : at + size] += same[:, None].double()
    owner_of = _items(layout["cu_tiles"][None], total) if "cu_tiles" in layout else item_of
    if "bias" in layout:  # to add b to a score is to attend exp(b) times
        first = layout["cu_seqlens_k"][1, item_of[:, None].long()]
        column = torch.arange(sizes[1])[None] - first
        inside = (column >= 0) & (column < layout["bias"].shape[1])
        weight = layout["bias"].double().exp()[owner_of[:, None], column.clamp(0, layout["bias"].shape[1] - 1)]
        out[:, :, sizes[0] : sizes[0] + sizes[1]] *= torch.where(inside, weight, 0.0)[:, None]
    if "k_ref" in o:
        offsets, first = layout["ref_offsets"], sizes[0] + sizes[1]
        for head in range(heads):
            row = offsets[min(head * key_heads // heads, offsets.shape[0] - 1)].tolist()
            for owner, (a, b) in enumerate(pairwise(row)):
                seen = torch.bincount(layout["ref_indices"][a:b].long(), minlength=sizes[2]).double()
                out[owner_of == owner, head, first:] += seen
    return out


def _items(cu: Tensor, rows: int) -> Tensor:
    out = torch.full((rows,), -1)
    for part in cu.tolist():
        for item, (a, b) in enumerate(pairwise(part)):
            out[a:b] = item
    return out


def truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T): dense attention over every key, each weighted by how often it is attended to."""
    o = problem.operands
    scale = problem.options.get("scale") or o["q"].shape[2] ** -0.5
    k, v = (torch.cat([o[n] for n in names if n in o]) for names in (("k", "k2", "k_ref"), ("v", "v2", "v_ref")))
    k, v = (x.repeat_interleave(o["q"].shape[1] // x.shape[1], dim=1) for x in (k, v))
    weight = counts(problem).to(k.device)
    e = weight * (torch.einsum("nhc,khc->nhk", o["q"], k) * scale).exp()
    total = e.sum(-1)
    safe = torch.where(total == 0, 1.0, total)
    out = torch.einsum("nhk,khc->nhc", e / safe[..., None], v)
    return out, torch.where(total == 0, float("-inf"), safe.log()).t()


def grad_out(out: Tensor, seed: int = 1) -> Tensor:
    """The weights of `gradients`: of eight bits, so that they are the same numbers in every precision."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=generator).bfloat16().to(out)


def gradients(problem: Problem, out: Tensor, lse: Tensor | None, seed: int = 1) -> dict[str, Tensor]:
    """Gradients of a random weighting of out, and of lse where given (finite entries only)."""
    weight = grad_out(out, seed)
    loss = (out * weight).sum()
    if lse is not None:
        weight = grad_out(lse, seed + 1)
        loss = loss + (torch.where(lse.isinf(), 0.0, lse) * weight).sum()
    if not loss.requires_grad:  # the definition of nothing attended to is a constant
        return {n: torch.zeros_like(x) for n, x in problem.operands.items()}
    got = torch.autograd.grad(loss, list(problem.operands.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(problem.operands.items(), got, strict=True)}

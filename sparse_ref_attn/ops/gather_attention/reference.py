r"""The definition, in plain PyTorch and in the precision of its inputs.

    out[j, h] = sum_k p_jhk v[k, g]        p_jhk = exp(a <q[j, h], k[k, g]> - lse[j, h])
    lse[j, h] = log sum_k exp(a <q[j, h], k[k, g]>)

k runs over the dense keys of the item that holds query j and over the bank rows kept for that item, or for the tile
that holds it (and key/value head); g = h // (H / G) is the key/value head of query head h. A tile's bias b[k] is added
to a <q, k> for the keys of k2. No key at all, or none but those of bias -inf, gives out = 0 and lse = -inf.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arguments import Arguments, HostLayout, check_values

__all__ = ["gather_attention_reference"]


def gather_attention_reference(a: Arguments) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) in the dtype of q, computed in it, and lse (H, T); differentiable to any order."""
    layout = HostLayout.of(a)
    check_values(a, layout)
    if a.cu_tiles is not None:
        return _tiles(a, layout)
    group = a.q.shape[1] // a.key_heads
    out = torch.zeros_like(a.q, memory_format=torch.contiguous_format)
    lse = a.q.new_full((a.q.shape[0], a.q.shape[1]), float("-inf"))
    for item in range(a.items):
        rows = _rows(layout.query_rows(item), a.q.device)
        for head in range(a.key_heads):
            k, v = _keys_of(a, layout, item, item, head)
            if k.shape[0] == 0 or rows.shape[0] == 0:
                continue
            heads = torch.arange(head * group, (head + 1) * group, device=a.q.device)
            scores = torch.einsum("nhc,kc->nhk", a.q[rows[:, None], heads], k) * a.scale
            total = scores.logsumexp(dim=-1)
            probabilities = (scores - total[..., None]).exp()
            out = out.index_put((rows[:, None], heads), torch.einsum("nhk,kc->nhc", probabilities, v))
            lse = lse.index_put((rows[:, None], heads), total)
    return out, lse.t().to(torch.promote_types(a.q.dtype, torch.float32)).contiguous()


def _tiles(a: Arguments, layout: HostLayout) -> tuple[Tensor, Tensor]:
    """The same where each tile of queries has a selection of its own, and a bias on the keys of k2."""
    outs, totals = [], []
    for tile, (item, (start, stop)) in enumerate(zip(layout.tile_items, pairwise(layout.tiles), strict=True)):
        if start == stop:
            continue
        of_heads = []
        for head, q in enumerate(a.q[start:stop].unflatten(1, (a.key_heads, -1)).unbind(1)):
            k, v = _keys_of(a, layout, item, tile, head)
            scores = torch.einsum("nhc,kc->nhk", q, k) * a.scale
            if a.bias is not None:
                before, count = (sum(y - x for x, y in layout.key_rows(n, item)) for n in (0, 1))
                after = k.shape[0] - before - count
                scores = scores + pad(a.bias[tile, :count].to(scores.dtype), (before, after))
            of_heads.append(_attend(scores, v))
        outs.append(torch.cat([out for out, _ in of_heads], dim=1))
        totals.append(torch.cat([total for _, total in of_heads], dim=1))
    out = torch.cat(outs) if outs else torch.zeros_like(a.q)
    lse = torch.cat(totals) if totals else a.q.new_empty(a.q.shape[:2])
    return out, lse.t().to(torch.promote_types(a.q.dtype, torch.float32)).contiguous()


def _attend(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (N, H, K), any of them -inf, and values (K, C) -> out (N, H, C), lse (N, H)."""
    if not scores.shape[2]:
        return scores.new_zeros(*scores.shape[:2], v.shape[1]), scores.new_full(scores.shape[:2], float("-inf"))
    largest = scores.detach().amax(dim=-1, keepdim=True)
    weights = (scores - torch.where(largest.isinf(), 0.0, largest)).exp()
    total = weights.sum(dim=-1)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    out = torch.einsum("nhk,kc->nhc", weights / total[..., None], v)
    return out, torch.where(empty, float("-inf"), total.log() + largest.squeeze(-1))


def _keys_of(a: Arguments, layout: HostLayout, item: int, selection: int, head: int) -> tuple[Tensor, Tensor]:
    """All keys and values (K, C) of one key/value head: the item's dense ones and those of an item's or tile's kept."""
    keys, values = [a.q.new_empty(0, a.q.shape[2])], [a.q.new_empty(0, a.q.shape[2])]
    for n, (k, v, _) in enumerate(a.segments):
        rows = _rows(layout.key_rows(n, item), k.device)
        keys.append(k[rows, head])
        values.append(v[rows, head])
    if a.k_ref is not None and a.v_ref is not None and a.ref_indices is not None:
        start, stop = layout.kept(selection, head)
        rows = a.ref_indices[start:stop].long()
        keys.append(a.k_ref[rows, head])
        values.append(a.v_ref[rows, head])
    return torch.cat(keys), torch.cat(values)


def _rows(ranges: list[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(*r) for r in ranges)]).to(device)

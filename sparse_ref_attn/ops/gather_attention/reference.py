r"""The definition, in plain PyTorch and in the precision of its inputs.

    out[j, h] = sum_k p_jhk v[k, g]        p_jhk = exp(a <q[j, h], k[k, g]> - lse[j, h])
    lse[j, h] = log sum_k exp(a <q[j, h], k[k, g]>)

k runs over the dense keys of the item that holds query j and over the bank rows kept for that item
(and key/value head); g = h // (H / G) is the key/value head of query head h.
No key at all gives out = 0 and lse = -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Arguments, HostLayout, check_values

__all__ = ["gather_attention_reference"]


def gather_attention_reference(a: Arguments) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) in the dtype of q, computed in it, and lse (H, T); differentiable to any order."""
    layout = HostLayout.of(a)
    check_values(a, layout)
    group = a.q.shape[1] // a.key_heads
    out = torch.zeros_like(a.q, memory_format=torch.contiguous_format)
    lse = a.q.new_full((a.q.shape[0], a.q.shape[1]), float("-inf"))
    for item in range(a.items):
        rows = _rows(layout.query_rows(item), a.q.device)
        for head in range(a.key_heads):
            k, v = _keys_of(a, layout, item, head)
            if k.shape[0] == 0 or rows.shape[0] == 0:
                continue
            heads = torch.arange(head * group, (head + 1) * group, device=a.q.device)
            scores = torch.einsum("nhc,kc->nhk", a.q[rows[:, None], heads], k) * a.scale
            total = scores.logsumexp(dim=-1)
            probabilities = (scores - total[..., None]).exp()
            out = out.index_put((rows[:, None], heads), torch.einsum("nhk,kc->nhc", probabilities, v))
            lse = lse.index_put((rows[:, None], heads), total)
    return out, lse.t().to(torch.promote_types(a.q.dtype, torch.float32)).contiguous()


def _keys_of(a: Arguments, layout: HostLayout, item: int, head: int) -> tuple[Tensor, Tensor]:
    """All keys and values (K, C) that one item's queries attend to in one key/value head."""
    keys, values = [a.q.new_empty(0, a.q.shape[2])], [a.q.new_empty(0, a.q.shape[2])]
    for n, (k, v, _) in enumerate(a.segments):
        rows = _rows(layout.key_rows(n, item), k.device)
        keys.append(k[rows, head])
        values.append(v[rows, head])
    if a.k_ref is not None and a.v_ref is not None and a.ref_indices is not None:
        start, stop = layout.kept(item, head)
        rows = a.ref_indices[start:stop].long()
        keys.append(a.k_ref[rows, head])
        values.append(a.v_ref[rows, head])
    return torch.cat(keys), torch.cat(values)


def _rows(ranges: list[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(*r) for r in ranges)]).to(device)

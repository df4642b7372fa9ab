"""What `gather_attention` promises whoever computes it: each takes a backend and a dtype, and asserts.

Shapes fill more than one tile of the kernels and part of another; the reference rows lie in a bank of `BANK`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_ref_attn.functional import gather_attention

from .problems import NAMES, Problem, grad_out, gradients, make
from .rounding import assert_rounded, of_attention
from .tolerance import assert_as_accurate

BANK = 44


def two_items(dtype: torch.dtype) -> Problem:
    return make(((35, 21),), ((40, 17),), (33, 20), BANK, channels=32).to(dtype)


def order_of_kept_rows(backend: str, dtype: torch.dtype) -> None:
    problem = two_items(dtype)
    first = int(problem.layout["ref_offsets"][0, 1])
    items = problem.layout["ref_indices"].tensor_split([first])
    flipped = {**problem.layout, "ref_indices": torch.cat([rows.flip(0) for rows in items])}
    exact, low = problem.to(torch.float64).leaves(), problem.leaves()
    turned = Problem({n: x.clone() for n, x in problem.operands.items()}, flipped).leaves()
    (want, _), (plain, _), (got, _) = exact.run("reference"), low.run("reference"), turned.run(backend)
    wanted, allowed, gradient = (
        {"out": o.detach(), **gradients(p, o, None)} for p, o in ((exact, want), (low, plain), (turned, got))
    )
    deviations = of_attention(problem, grad_out(got)) if dtype == torch.float32 else None
    for name in wanted:
        if deviations is None:
            assert_as_accurate(gradient[name], wanted[name], allowed[name], name)
        else:
            assert_rounded(gradient[name], wanted[name], deviations[name], name)


def keeping_all_rows(backend: str, dtype: torch.dtype) -> None:
    """Dense attention over the same keys, by torch's own function."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, 3, 32, generator=generator).to(dtype) for n in (35, 75, 75))
    everything = torch.arange(80).view(2, 40)
    got = gather_attention(q, k[:, :35], v[:, :35], k[:, 35:], v[:, 35:], everything, backend=backend)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    want = dense(q.double(), k.double(), v.double())
    if dtype == torch.float32:
        each = [
            Problem(dict(zip("qkv", operands, strict=True)), whole(35, 75)) for operands in zip(q, k, v, strict=True)
        ]
        assert_rounded(got, want, torch.stack([of_attention(p)["out"] for p in each]), "out")
    else:
        assert_as_accurate(got, want, dense(q, k, v), "out")


def whole(queries: int, keys: int) -> dict[str, Tensor]:
    """The layout of one item that is all there is."""
    return {"cu_seqlens_q": torch.tensor([[0, queries]]), "cu_seqlens_k": torch.tensor([[0, keys]])}


def neighbours(backend: str, dtype: torch.dtype) -> None:
    """An item's bits, forward and backward, do not depend on the others of its batch."""
    problem = two_items(dtype)
    changed = {n: x.clone() for n, x in problem.operands.items()}
    starts = {"q": 35, "k": 40, "v": 40}
    for name, start in starts.items():
        changed[name][start:] *= -3
    pair = problem.leaves(), Problem(changed, problem.layout).leaves()
    (out, lse), (other_out, other_lse) = (p.run(backend) for p in pair)
    assert torch.equal(out[:35], other_out[:35])
    assert torch.equal(lse[:, :35], other_lse[:, :35])
    assert not torch.allclose(out[35:], other_out[35:])
    grads, others = gradients(pair[0], out, lse), gradients(pair[1], other_out, other_lse)
    for name, start in starts.items():
        assert torch.equal(grads[name][:start], others[name][:start])
        assert not torch.allclose(grads[name][start:], others[name][start:])


def dropped_rows(backend: str, dtype: torch.dtype) -> None:
    """Their gradient is exactly zero, whatever they hold; that of a kept row is not."""
    problem = two_items(dtype)
    kept = problem.layout["ref_indices"].long().unique()
    dropped = torch.ones(BANK, dtype=torch.bool)
    dropped[kept] = False
    assert dropped.any()
    for name in ("k_ref", "v_ref"):
        problem.operands[name][dropped] = float("nan")
    problem = problem.leaves()
    grads = gradients(problem, *problem.run(backend))
    for name in ("k_ref", "v_ref"):
        assert (grads[name][dropped] == 0).all()
        assert (grads[name][kept].flatten(1).abs().amax(1) > 0).all()
    assert all(x.isfinite().all() for x in grads.values())


def empty_selection(backend: str, dtype: torch.dtype) -> None:
    """Attention without references, to the bit, for the item that keeps none; finite; nothing flows into the bank."""
    problem = two_items(dtype)
    nothing = {"ref_indices": problem.layout["ref_indices"][:0], "ref_offsets": torch.zeros(1, 3, dtype=torch.int32)}
    some = {"ref_indices": problem.layout["ref_indices"][:33], "ref_offsets": torch.tensor([[0, 33, 33]])}
    without = {n: x for n, x in problem.operands.items() if n not in ("k_ref", "v_ref")}
    alone = Problem(without, {n: x for n, x in problem.layout.items() if n.startswith("cu_")}).leaves()
    out, lse = alone.run(backend)
    grads = gradients(alone, out, lse)
    for selection, start in ((nothing, 0), (some, 35)):
        empty = replace(problem, layout=problem.layout | selection).leaves()
        got, got_lse = empty.run(backend)
        assert torch.equal(got[start:], out[start:])
        assert torch.equal(got_lse[:, start:], lse[:, start:])
        got_grads = gradients(empty, got, got_lse)
        assert all(got_grads[n].isfinite().all() for n in NAMES if n in got_grads)
        for name, first in (("q", 35), ("k", 40), ("v", 40)):
            rows = slice(first if start else 0, None)
            assert torch.equal(got_grads[name][rows], grads[name][rows])
        assert start or not any(got_grads[name].any() for name in ("k_ref", "v_ref"))


INVARIANTS = (order_of_kept_rows, keeping_all_rows, neighbours, dropped_rows, empty_selection)

"""The yardstick of float32: plain PyTorch is within it in any order of summation, what loses precision is not."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from .problems import Problem, grad_out, gradients, grid, make, truth
from .rounding import assert_rounded, of_attention, of_mass, of_product

PROBLEMS = {**grid(32), "head dim 128": make(((40,),), ((33,),), (34,), 50, heads=1, channels=128)}


def results(problem: Problem) -> dict[str, Tensor]:
    problem = problem.leaves()
    out, lse = truth(problem) if problem.operands["q"].dtype == torch.float64 else problem.run("reference")
    return {"out": out.detach(), "lse": lse.detach(), **gradients(problem, out, lse)}


@cache
def measured(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The truth of a problem in float32 and what rounding may do to it."""
    problem = PROBLEMS[name].to(torch.float32)
    want = results(problem.to(torch.float64))
    out, lse = want["out"].float(), want["lse"].float()
    return want, of_attention(problem, grad_out(out), grad_out(lse, 2))


def in_order(problem: Problem, seed: int) -> tuple[Problem, Tensor]:
    """The same problem with its channels, and each item's kept rows, in another order."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randperm(problem.operands["q"].shape[2], generator=generator)
    layout = dict(problem.layout)
    if "ref_indices" in layout and layout["ref_offsets"].shape[0] == 1:
        spans = layout["ref_indices"].tensor_split(layout["ref_offsets"][0, 1:-1].long())
        layout["ref_indices"] = torch.cat([x[torch.randperm(len(x), generator=generator)] for x in spans])
    return Problem({n: x[..., channels] for n, x in problem.operands.items()}, layout), channels


@pytest.mark.parametrize("name", PROBLEMS)
def test_plain_pytorch_is_within_it_in_any_order_of_summation(name: str) -> None:
    problem = PROBLEMS[name].to(torch.float32)
    want, deviation = measured(name)
    for seed in range(4):
        turned, channels = in_order(problem, seed)
        turned = turned.leaves()
        out, lse = turned.run("reference")
        weights = grad_out(want["out"].float())[..., channels]
        loss = (out * weights).sum() + (torch.where(lse.isinf(), 0.0, lse) * grad_out(lse, 2)).sum()
        leaves = list(turned.operands.values())
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        back = channels.argsort()
        got = {"out": out.detach()[..., back], "lse": lse.detach()} | {
            n: torch.zeros_like(x) if g is None else g[..., back]
            for (n, x), g in zip(turned.operands.items(), grads, strict=True)
        }
        for part in want:
            assert_rounded(got[part], want[part], deviation[part], part)


def tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, as tensor cores read float32 where they may."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


LOSSES = {
    "operands in TF32": lambda p: Problem({n: tf32(x) for n, x in p.operands.items()}, p.layout),
    "queries in half precision": lambda p: Problem(p.operands | {"q": p.operands["q"].half().float()}, p.layout),
    "values in bfloat16": lambda p: Problem(
        {n: x.bfloat16().float() if n[0] == "v" else x for n, x in p.operands.items()}, p.layout
    ),
    "a scale off by 1e-5": lambda p: Problem(p.operands, p.layout, {"scale": 32**-0.5 * (1 + 1e-5)}),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["one token", "text and image rows apart"])
def test_what_loses_precision_is_not(name: str, loss: str) -> None:
    problem = PROBLEMS[name].to(torch.float32)
    want, deviation = measured(name)
    got = results(LOSSES[loss](problem))
    touched = [n for n in want if loss != "values in bfloat16" or n == "out"]
    for part in ("out", "q", "k_ref"):
        if part in touched:
            with pytest.raises(AssertionError, match=f"{part}: error .*, rounding in float32 allows"):
                assert_rounded(got[part], want[part], deviation[part], part)


def test_it_is_about_a_rounding_of_each_step_and_not_more() -> None:
    """Six deviations are a few units in the last place of the largest element."""
    for name in ("ragged items, one bank", "two dense tensors, grouped heads"):
        want, deviation = measured(name)
        for part in want:
            assert 6 * deviation[part].max() < 1e-5 * want[part].abs().max(), part


def test_a_product_and_a_mass() -> None:
    x, y = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    deviation = of_product(x, y)
    assert_rounded(x @ y, x.double() @ y.double(), deviation)
    with pytest.raises(AssertionError, match="elements are farther off"):
        assert_rounded(tf32(x) @ y, x.double() @ y.double(), deviation)
    q, k = x[None, :, None], y[None, :, None]
    exact = (torch.einsum("bnhc,bshc->bhns", q.double(), k.double()) * 0.3).softmax(-1)[..., 5:].mean(2)
    deviation, _ = of_mass(q, k, (5, 32), 0.3)
    for dtype, right in ((torch.float32, True), (torch.float16, False)):
        scores = torch.einsum("bnhc,bshc->bhns", q, k) * 0.3
        mass = scores.to(dtype).softmax(-1).float()[..., 5:].mean(2)
        if right:
            assert_rounded(mass, exact, deviation)
        else:
            with pytest.raises(AssertionError, match="rounding in float32 allows"):
                assert_rounded(mass, exact, deviation)


def test_nan_and_infinities_are_never_within_it() -> None:
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="1 of 2 are NaN"):
        assert_rounded(torch.tensor([1.0, float("nan")]), one, one)
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_rounded(torch.ones(2), torch.tensor([1.0, float("inf")], dtype=torch.float64), one)

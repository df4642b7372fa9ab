"""pack_rows and unpack_rows: several tensors, gradients of the registered ops, and how they sit in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.functional import pack_rows, unpack_rows
from sparse_ref_attn.ops.pack_rows.registered import pack_op, unpack_op

ROWS = torch.tensor([0, 3, 4, 8])


def tokens() -> list[Tensor]:
    """Tensors of 9 tokens that agree in nothing else."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 9, 5, dtype=torch.float64, generator=generator),
        torch.arange(27).view(1, 9, 3),
        torch.randn(3, 9, generator=generator) > 0,
        torch.randn(2, 9, 4, 8, generator=generator).bfloat16(),
        torch.randn(1, 9, 2, dtype=torch.complex64, generator=generator),
    ]


def by_hand(x: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([x[:, r] for r in rows.tolist()], 1)


def through_op(x: list[Tensor], rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(pack_op(x, rows, 1, "auto"))


@pytest.mark.parametrize("pack", [pack_rows, through_op])
def test_several_tensors_at_once(pack: Callable[..., tuple[Tensor, ...]]):
    x = tokens()
    packed = pack(x, ROWS)
    assert isinstance(packed, tuple)
    for one, expected in zip(packed, x, strict=True):
        assert torch.equal(one, by_hand(expected, ROWS))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_back_in_place_and_the_rest_zero(index: torch.dtype, backend: str):
    x = tokens()
    rows = ROWS.to(index)
    back = unpack_rows(pack_rows(x, rows, backend=backend), rows, 9, backend=backend)
    op = unpack_op(pack_op(x, rows, 1, backend), rows, 9, 1, backend)
    kept = torch.zeros(9, dtype=torch.bool)
    kept[ROWS] = True
    for one, other, original in zip(back, op, x, strict=True):
        assert torch.equal(one[:, kept], original[:, kept])
        assert not one[:, ~kept].any()
        assert torch.equal(one, other)


def test_gradients_of_the_registered_ops():
    x = [torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True), torch.randn(1, 9, dtype=torch.float64)]
    x[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: tuple(pack_op(list(t), ROWS, 1, "auto")), x, check_batched_grad=False)
    y = [t.detach()[:, :4].contiguous().requires_grad_() for t in x]
    assert torch.autograd.gradcheck(lambda *t: tuple(unpack_op(list(t), ROWS, 9, 1, "auto")), y)
    assert torch.autograd.gradgradcheck(lambda *t: tuple(pack_op(list(t), ROWS, 1, "auto")), x)


def test_a_dropped_row_has_a_gradient_of_exactly_zero_and_integers_have_none():
    x = tokens()
    x[0].requires_grad_()
    packed = pack_op(x, ROWS, 1, "auto")
    packed[0].pow(2).sum().backward()
    expected = torch.zeros_like(x[0])
    expected[:, ROWS] = 2 * x[0].detach()[:, ROWS]
    assert torch.equal(x[0].grad, expected)
    assert not packed[1].requires_grad


def test_opcheck():
    x = [torch.randn(2, 9, 3, requires_grad=True), torch.randn(1, 9)]
    torch.library.opcheck(pack_op, (x, ROWS, 1, "auto"))
    torch.library.opcheck(unpack_op, ([t[:, :4].detach().requires_grad_() for t in x], ROWS, 9, 1, "auto"))


def compiled_step(y: Tensor, rows: Tensor, *public: Tensor) -> list[Tensor]:
    """The registered ops, which stand behind another backend, on y, and public functions on the other tensors."""
    kept = pack_rows(public, rows) if public else ()
    (own,) = unpack_op(pack_op([y], rows, 1, "auto"), rows, 9, 1, "auto")
    return [own, *(unpack_rows(one * kept[-1], rows, 9) for one in kept[:-1])]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles_whole_with_gradients_and_once_for_all_lengths(backend: str):
    """Inductor has the registered ops alone: what is public would be C++ of its own, and of no claim."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(compiled_step, fullgraph=True, dynamic=True, backend=backend)
    weights = torch.randn(2, 9, 3)
    for kept in (4, 5, 8):  # none equal to another size: the compiler would take them for one
        rows = torch.randperm(9, generator=torch.Generator().manual_seed(kept))[:kept]
        leaves = [torch.randn(2, 9, 3, requires_grad=True) for _ in range(1 + (backend != "inductor"))]
        public = (*leaves[1:], torch.randn(1, 9, 3)) if leaves[1:] else ()
        got, expected = (step(leaves[0], rows, *public) for step in (compiled, compiled_step))
        torch.testing.assert_close(got, expected)
        grads, want = (torch.autograd.grad([(weights * one).sum() for one in each], leaves) for each in (got, expected))
        torch.testing.assert_close(grads, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_bad_input_is_refused_in_words():
    with pytest.raises(LayoutError, match="tensors must share the token axis"):
        pack_rows([torch.zeros(1, 9), torch.zeros(1, 8)], ROWS)
    with pytest.raises(LayoutError, match="at least one tensor"):
        pack_rows([], ROWS)
    with pytest.raises(ConfigError, match="triton: needs a CUDA device"):
        pack_rows(torch.zeros(1, 9), ROWS, backend="triton")
    with pytest.raises(LayoutError, match=r"rows must lie in \[0, 9\), got values from 9 to 9"):
        pack_rows(torch.zeros(1, 9), torch.tensor([9]))

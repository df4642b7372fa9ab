"""The definition and the SDPA backend against dense attention in float64 (`test_invariants`: what the op promises)."""

from __future__ import annotations

import pytest
import torch

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.functional import gather_attention
from sparse_ref_attn.ops.gather_attention.arguments import Arguments
from sparse_ref_attn.ops.gather_attention.gradients import Wanted
from sparse_ref_attn.ops.gather_attention.impl import flash
from sparse_ref_attn.ops.gather_attention.impl.packed import pack, unpack_gradients
from sparse_ref_attn.ops.gather_attention.registered import backward_op, forward_op

from .problems import NAMES, Problem, grad_out, gradients, make, truth

PROBLEMS = {
    "one item": make(((7,),), ((5,),), (3,), 6),
    "one token": make(((1,),), ((1,),), (1,), 1),
    "three ragged items, one bank": make(((7, 1, 4),), ((5, 2, 9),), (3, 0, 6), 6),
    "text and image rows apart": make(((2, 3), (4, 5)), ((3, 1), (2, 6)), (2, 4), 5),
    "two dense tensors": make(((2, 3),), ((3, 0),), (2, 4), 5, second=(4, 2)),
    "empty items": make(((3, 0, 2),), ((0, 4, 0),), (0, 2, 3), 5),
    "nothing to attend to": make(((3, 2),), ((0, 0),), (0, 0), 5),
    "no queries": make(((0,),), ((4,),), (2,), 5),
    "bank alone": make(((5, 3),), None, (4, 2), 7),
    "dense alone": make(((5, 3),), ((4, 2),), None),
    "rows named twice": make(((5, 3),), ((4, 2),), (6, 5), 3, repeats=True),
    "grouped heads": make(((5, 3),), ((4, 2),), (3, 2), 7, heads=6, key_heads=2, channels=24),
    "a selection per key head": make(((5, 3),), ((4, 2),), ((3, 0), (1, 4)), 7, heads=4, key_heads=2),
}


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_output_lse_and_every_gradient_equal_dense_attention(name: str, backend: str) -> None:
    problem = PROBLEMS[name].leaves()
    exact = PROBLEMS[name].leaves()
    out, lse = problem.run(backend)
    want_out, want_lse = truth(exact)
    same(out, want_out)
    same(lse, want_lse)
    got = gradients(problem, out, lse)
    want = gradients(exact, want_out, want_lse)
    for tensor in want:
        same(got[tensor], want[tensor])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradcheck_through_output_and_lse(backend: str) -> None:
    problem = make(((2, 1), (1, 2)), ((2, 0), (1, 1)), (2, 1), 3, heads=2, key_heads=1, channels=4, repeats=True)
    names = list(problem.operands)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return Problem(dict(zip(names, tensors, strict=True)), problem.layout).run(backend)

    assert torch.autograd.gradcheck(call, tuple(problem.leaves().operands.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_errs_no_more_than_twice_pytorch_itself(dtype: torch.dtype) -> None:
    problem = make(((33, 17),), ((20, 41),), (9, 30), 40, heads=3, channels=64).to(dtype)
    exact = problem.to(torch.float64).leaves()
    want = truth(exact)
    want_grads = gradients(exact, *want)
    errors = {}
    for backend in ("reference", "sdpa"):
        low = problem.leaves()
        out, lse = low.run(backend)
        assert lse.dtype == torch.float32
        grads = gradients(low, out, lse)
        pairs = [(out, want[0]), *((grads[n], want_grads[n]) for n in grads)]
        errors[backend] = [(got.double() - exact).abs().max().item() for got, exact in pairs]
    slack = 2 * torch.finfo(dtype).eps  # rounding of the result itself
    for got, allowed, scale in zip(errors["sdpa"], errors["reference"], [1.0] * 6, strict=True):
        assert got <= 2 * allowed + slack * scale


def test_batched_operands_equal_packed_ones() -> None:
    problem = make(((4, 4),), ((3, 3),), (2, 2), 6, second=(5, 5))
    o = problem.operands
    out, lse = problem.run("sdpa")
    q, k, v, k2, v2 = (o[n].unflatten(0, (2, -1)) for n in ("q", "k", "v", "k2", "v2"))
    got, got_lse = gather_attention(
        q, k, v, o["k_ref"], o["v_ref"], problem.layout["ref_indices"].view(2, 2), k2=k2, v2=v2, return_lse=True
    )
    same(got, out.view(got.shape))
    same(got_lse, lse.unflatten(1, (2, 4)).transpose(0, 1))


def test_distinct_rows_stored_directly_give_the_same_gradient() -> None:
    base = make(((5, 3),), ((4, 2),), (3, 4), 9)
    layout = {**base.layout, "ref_indices": torch.tensor([8, 1, 0, 2, 3, 7, 5])}
    summed = Problem(base.operands, layout).leaves()
    stored = Problem(base.operands, layout).leaves()
    want = gradients(summed, *summed.run("sdpa"))
    got = gradients(stored, *stored.run("sdpa", distinct=True))
    for name in want:
        same(got[name], want[name])


def test_strided_operands() -> None:
    joint = torch.randn(3, 11, 2, 16, dtype=torch.float64)  # q, k, v of one projection, heads swapped
    q, k, v = joint.transpose(1, 2).contiguous().transpose(1, 2).unbind(0)
    problem = Problem({"q": q, "k": k[:5], "v": v[:5], "k_ref": k[5:], "v_ref": v[5:]}, {})
    layout = {"cu_seqlens_q": torch.tensor([[0, 11]]), "cu_seqlens_k": torch.tensor([[0, 5]])}
    layout |= {"ref_indices": torch.tensor([4, 2, 0]), "ref_offsets": torch.tensor([[0, 3]])}
    problem = Problem(problem.operands, layout)
    same(problem.run("sdpa")[0], truth(problem)[0])


def test_opcheck() -> None:
    for name in ("two dense tensors", "bank alone"):
        problem = PROBLEMS[name].leaves()
        tensors = [problem.operands.get(n) for n in ("q", "k", "v", "k2", "v2", "k_ref", "v_ref")]
        offsets = ("cu_seqlens_q", "cu_seqlens_k", "ref_indices", "ref_offsets")
        layout = [problem.layout.get(n) for n in offsets]
        torch.library.opcheck(forward_op, (*tensors, *layout, 0.25, False, None, None, None, "sdpa", False))
        plain = [None if t is None else t.detach() for t in tensors]
        out, lse = forward_op(*plain, *layout, 0.25, False, None, None, None, "sdpa", False)
        arguments = (out, lse, out, lse, *plain, *layout, 0.25, False, None, "sdpa", [True, False, True])
        torch.library.opcheck(backward_op, arguments)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiles_as_one_graph_forward_and_backward(compiler: str) -> None:
    torch._dynamo.reset()
    problem, plain = (make(((5, 3),), ((4, 2),), (3, 2), 7).to(torch.float32).leaves() for _ in range(2))

    def block(**operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gather_attention(**operands, **problem.layout, return_lse=True)

    want = block(**plain.operands)
    got = torch.compile(block, fullgraph=True, backend=compiler)(**problem.operands)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(problem, *got), gradients(plain, *want))


def test_new_lengths_do_not_recompile() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    call = torch.compile(gather_attention, fullgraph=True, backend=counter)
    for queries, keys, kept in ((5, 7, 3), (6, 8, 4), (9, 11, 6), (13, 17, 8), (21, 19, 10)):
        problem = make(((queries, 2),), ((keys, 3),), (kept, 2), 30 + queries, seed=kept)
        got = call(**problem.operands, **problem.layout)
        same(got, truth(problem)[0])
    assert counter.frame_count <= 2  # the first lengths, then any


def spoil(**changes: object) -> dict[str, object]:
    problem = make(((5, 3),), ((4, 2),), (3, 2), 7).to(torch.float32)
    return {**problem.operands, **problem.layout, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(8, 16)}, r"q must be \(T, H, C\)"),
        ({"q": torch.zeros(8, 2, 16, dtype=torch.int32)}, "floating"),
        ({"q": torch.zeros(8, 16, 2).transpose(1, 2)}, "contiguous in its last dimension"),
        ({"v": None}, "k and v go together"),
        ({"v": torch.zeros(6, 2, 8)}, "share one shape"),
        ({"k": torch.zeros(6, 2, 16).half()}, "k must have the dtype and device of q"),
        ({"k": torch.zeros(6, 3, 16), "v": torch.zeros(6, 3, 16)}, "number of heads that divides"),
        ({"k": None, "v": None, "k_ref": None, "v_ref": None}, "there must be keys"),
        ({"ref_indices": None}, "k_ref and ref_indices go together"),
        ({"ref_indices": torch.zeros(5)}, "int32 or int64"),
        ({"ref_indices": torch.tensor([0, 1, 2, 3, 7])}, r"lie in \[0, 7\), got values from 0 to 7"),
        ({"ref_indices": torch.tensor([0, 1, -2, 3, 4])}, r"got values from -2 to 4"),
        ({"ref_offsets": torch.tensor([0, 3, 4])}, "ref_offsets must end at the 5 rows of ref_indices, got 4"),
        ({"ref_offsets": torch.tensor([0, 6, 5])}, "must not decrease"),
        ({"ref_offsets": torch.tensor([0, 5])}, "for 2 items"),
        ({"ref_offsets": torch.zeros(3, 3, dtype=torch.int64)}, r"one per key head \(2\)"),
        ({"ref_offsets": None}, "must come with ref_offsets"),
        ({"cu_seqlens_q": torch.tensor([1, 5, 8])}, "must start at 0"),
        ({"cu_seqlens_q": torch.tensor([0, 5, 7])}, "must end at the 8 rows of q"),
        ({"cu_seqlens_k": torch.tensor([0, 6])}, "same 2 items"),
        ({"k2": torch.zeros(3, 2, 16), "v2": torch.zeros(3, 2, 16)}, "one row for k and one for k2"),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        gather_attention(**spoil(**changes))


def test_unknown_and_refusing_backends_are_named() -> None:
    with pytest.raises(ConfigError, match="must be one of auto, reference"):
        gather_attention(**spoil(backend="cutlass"))
    # a name that cannot do the call never falls back, and says everything that is against it
    with pytest.raises(ConfigError, match=r"triton: needs a CUDA device, got cpu.* got torch.float32.* 128, got 16"):
        gather_attention(**spoil(backend="triton"))


def test_a_scale_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scale must be positive and finite, got -1.0"):
        gather_attention(**spoil(scale=-1.0))


@pytest.mark.parametrize("name", [name for name in PROBLEMS if "per key head" not in name])
def test_flex_and_the_packing_that_flash_shares(name: str) -> None:
    problem = PROBLEMS[name].leaves()
    exact = PROBLEMS[name].leaves()
    want = truth(exact)
    with torch.no_grad():
        for got, expected in zip(PROBLEMS[name].run("flex"), want, strict=True):
            same(got, expected)
    # gradients of the packed rows, by the formula, brought back to where the rows came from
    layout = [problem.layout.get(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "ref_indices", "ref_offsets")]
    scale = problem.operands["q"].shape[2] ** -0.5
    a = Arguments(*(problem.operands.get(n) for n in NAMES), *layout, scale, False)
    p = pack(a)
    assert p.q_items.diff().ge(0).all()
    assert p.k_items.diff().ge(0).all()
    q, k, v = (x.detach().requires_grad_() for x in (p.q, p.k, p.v))
    k_all, v_all = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    e = (torch.einsum("nhc,khc->hnk", q, k_all) * scale).exp() * (p.q_items[:, None] == p.k_items[None])
    total = e.sum(-1, keepdim=True)
    out = p.put_back(torch.einsum("hnk,khc->nhc", e / torch.where(total == 0, 1.0, total), v_all))
    same(out, want[0])
    grads = torch.autograd.grad((out * grad_out(out)).sum(), (q, k, v))
    got = unpack_gradients(a, p, *grads, Wanted(True, True, True))
    expected = gradients(exact, want[0], None)
    for tensor, grad in zip(NAMES, got, strict=True):
        assert (grad is None) == (tensor not in expected)
        if grad is not None:
            same(grad, expected[tensor])


def test_flash_packs_and_calls_pytorch_with_what_it_takes() -> None:
    """On meta tensors: shapes and arguments. The packing itself is proved with "flex", the kernel on a card."""
    problem = make(((5, 3), (4, 0)), ((4, 2), (1, 6)), (3, 2), 7, heads=4, key_heads=2).to(torch.bfloat16)
    problem = problem.to(device="meta")
    layout = [problem.layout[n] for n in ("cu_seqlens_q", "cu_seqlens_k", "ref_indices", "ref_offsets")]
    a = Arguments(*(problem.operands.get(n) for n in NAMES), *layout, 0.25, False)
    out, lse = flash.forward(a)
    assert (out.shape, lse.shape, lse.dtype) == (a.q.shape, (4, 12), torch.float32)
    for grad_lse in (None, lse):
        grads = flash.backward(a, out, grad_lse, out, lse, Wanted(True, True, True))
        for grad, x in zip(grads, a.tensors, strict=True):
            assert (grad is None) == (x is None)
            assert x is None or grad.shape == x.shape


def test_flash_says_why_it_cannot() -> None:
    with pytest.raises(ConfigError, match=r"flash: needs a CUDA device, got cpu, needs float16 or bfloat16"):
        gather_attention(**spoil(backend="flash"))
    problem = PROBLEMS["a selection per key head"]
    with pytest.raises(ConfigError, match="flex: cannot give each key/value head a selection of its own"):
        problem.run("flex")
    with pytest.raises(ConfigError, match="flex: cannot compute gradients on a CPU"):
        PROBLEMS["one item"].leaves().run("flex")


def test_q_may_need_no_gradient() -> None:
    problem = make(((5, 3),), ((4, 2),), (3, 2), 7).leaves()
    problem.operands["q"].requires_grad_(False)
    problem.operands["k"].requires_grad_(False)
    (got,) = torch.autograd.grad(problem.run("sdpa")[0].sum(), problem.operands["v_ref"])
    exact = make(((5, 3),), ((4, 2),), (3, 2), 7).leaves()
    (want,) = torch.autograd.grad(truth(exact)[0].sum(), exact.operands["v_ref"])
    same(got, want)

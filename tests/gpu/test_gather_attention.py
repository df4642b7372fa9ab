"""The attention kernels on a card: float64 truth, the same bits every time, odd strides, far rows, CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.errors import LayoutError
from sparse_ref_attn.functional import gather_attention
from sparse_ref_attn.ops import verdicts
from sparse_ref_attn.ops.gather_attention.arguments import Arguments
from sparse_ref_attn.ops.gather_attention.backends import flash_packages
from sparse_ref_attn.ops.gather_attention.gradients import Wanted
from sparse_ref_attn.ops.gather_attention.impl import flash
from sparse_ref_attn.ops.gather_attention.impl.flash_packages import BACKWARD, FORWARD

from ..ops.guards import in_nan
from ..ops.problems import NAMES, Problem, gradients, make, truth
from ..ops.tolerance import assert_as_accurate
from .kernels import OWN, require

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FAR_BYTES = 2**32 + 2**20

PROBLEMS = {
    "one token": make(((1,),), ((1,),), (1,), 1, channels=32),
    "ragged items, one bank": make(((300, 1, 129),), ((100, 2, 513),), (333, 0, 70), 400, channels=64),
    "text and image rows apart": make(((63, 33), (400, 129)), ((63, 35), (336, 100)), (340, 4), 500, channels=128),
    "two dense tensors, grouped heads": make(
        ((333, 3),), ((3, 135),), (340, 4), 500, second=(140, 2), heads=4, key_heads=2, channels=128
    ),
    "empty items": make(((3, 0, 133),), ((0, 140, 0),), (0, 200, 133), 240, channels=64),
    "bank alone": make(((133, 3),), None, (140, 2), 170, channels=32),
    "dense alone": make(((133, 3),), ((134, 2),), None, channels=64),
    "rows named twice": make(((133, 300),), ((4, 2),), (135, 340), 90, repeats=True, channels=128),
    "a selection per key head": make(
        ((133, 300),), ((4, 2),), ((133, 0), (1, 340)), 400, heads=4, key_heads=2, channels=64
    ),
}


def results(problem: Problem, backend: str, through_lse: bool = True) -> dict[str, Tensor]:
    out, lse = problem.run(backend)
    return {"out": out.detach(), "lse": lse.detach(), **gradients(problem, out, lse if through_lse else None)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in PROBLEMS
        for backend in (*OWN, "sdpa", "flash", "flex")
        if backend in (*OWN, "sdpa") or "per key head" not in name
    ],
)
def test_output_lse_and_every_gradient(name: str, backend: str, dtype: torch.dtype) -> None:
    require(backend, PROBLEMS[name].operands["q"].shape[2])
    rounded = PROBLEMS[name].to(dtype)
    exact = rounded.to(torch.float64).leaves()
    out, lse = truth(exact)
    want = {"out": out.detach(), "lse": lse.detach(), **gradients(exact, out, lse)}
    low = results(rounded.leaves(), "reference")
    got = results(rounded.to(device=DEVICE).leaves(), backend)
    for tensor in want:
        assert_as_accurate(got[tensor].cpu(), want[tensor], low[tensor], tensor)


@pytest.mark.parametrize("package", FORWARD)
@pytest.mark.parametrize("name", [name for name in PROBLEMS if "per key head" not in name])
def test_every_package_with_flash_attention(name: str, package: str) -> None:
    why = flash_packages(torch.device(DEVICE), torch.bfloat16)[package]
    if why:
        pytest.skip(f"{package} {', '.join(why)}")
    rounded = PROBLEMS[name].to(torch.bfloat16)
    exact = rounded.to(torch.float64).leaves()
    want = truth(exact)
    low = rounded.leaves()
    low_out = low.run("reference")
    on_card = rounded.to(device=DEVICE)
    layout = [on_card.layout.get(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "ref_indices", "ref_offsets")]
    scale = rounded.operands["q"].shape[2] ** -0.5
    a = Arguments(*(on_card.operands.get(n) for n in NAMES), *layout, scale, False)
    got = flash.forward_by(FORWARD[package], a)
    for one, exactly, roughly, label in zip(got, want, low_out, ("out", "lse"), strict=True):
        assert_as_accurate(one.cpu(), exactly.detach(), roughly.detach(), label)
    if package in BACKWARD:
        grad_out, grad_lse = torch.randn_like(got[0]), torch.randn_like(got[1])
        grad_lse = torch.where(got[1].isinf(), 0.0, grad_lse)
        grads = flash.backward_by(BACKWARD[package], a, grad_out, grad_lse, *got, Wanted(True, True, True))
        seeds = (grad_out.cpu().double(), grad_lse.cpu().double())
        expected = given(exact, want, seeds)
        roughly = given(low, low_out, seeds)
        for label, grad in zip(NAMES, grads, strict=True):
            if grad is not None:
                assert_as_accurate(grad.cpu(), expected[label], roughly[label], label)


def given(problem: Problem, results: tuple[Tensor, Tensor], seeds: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients of out and lse weighted by the seeds; the lse only where there are keys."""
    out, lse = results
    loss = (out * seeds[0].to(out)).sum() + (torch.where(lse.isinf(), 0.0, lse) * seeds[1].to(lse)).sum()
    got = torch.autograd.grad(loss, list(problem.operands.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(problem.operands.items(), got, strict=True)}


def test_auto_takes_what_was_proved_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verdicts.forget()
    problem = PROBLEMS["ragged items, one bank"].to(torch.bfloat16, DEVICE)
    got = problem.run("auto")
    (verdict,) = verdicts.store.known().values()
    assert {"triton", "sdpa"} <= set(verdict.order)
    for one, expected in zip(got, problem.run(verdict.order[0]), strict=True):
        assert torch.equal(one, expected)
    verdicts.forget()


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("name", ["rows named twice", "a selection per key head", "text and image rows apart"])
def test_the_same_bits_every_time(name: str, backend: str) -> None:
    require(backend)
    problem = PROBLEMS[name].to(torch.bfloat16, DEVICE).leaves()
    first = results(problem, backend)
    for _ in range(10):
        for tensor, value in results(problem, backend).items():
            assert torch.equal(value, first[tensor]), tensor


@pytest.mark.parametrize(("backend", "gap"), [("triton", 16), ("triton", 48), ("cuda", 8), ("cuda", 24)])
def test_odd_strides_in_poisoned_memory(gap: int, backend: str) -> None:
    require(backend)
    rounded = PROBLEMS["ragged items, one bank"].to(torch.bfloat16)
    low = rounded.run("reference")
    want = truth(rounded.to(torch.float64))
    poisoned = {n: in_nan(x.to(DEVICE), gap) for n, x in rounded.operands.items()}
    layout = {n: x.to(DEVICE) for n, x in rounded.layout.items()}
    out, lse = Problem(poisoned, layout).run(backend)
    assert_as_accurate(out.cpu(), want[0], low[0], "out")
    assert_as_accurate(lse.cpu(), want[1], low[1], "lse")


@pytest.mark.parametrize("backend", OWN)
def test_a_bank_that_needs_int64_offsets(backend: str) -> None:
    require(backend)
    if torch.cuda.mem_get_info()[0] < FAR_BYTES:
        pytest.skip(f"needs {FAR_BYTES >> 30} GiB of free device memory")
    problem = make(((40,),), ((33,),), (3,), 3, heads=1, channels=64).to(torch.float16, DEVICE)
    flat = torch.empty(FAR_BYTES // 2, dtype=torch.float16, device=DEVICE)
    far = flat.as_strided((3, 1, 64), (2**30, 64, 1))
    far.copy_(problem.operands["k_ref"])
    moved = Problem({**problem.operands, "k_ref": far}, problem.layout)
    assert torch.equal(moved.run(backend)[0], problem.run(backend)[0])


@pytest.mark.parametrize("backend", OWN)
def test_forward_and_backward_in_a_cuda_graph(backend: str) -> None:
    require(backend)
    problem = PROBLEMS["rows named twice"].to(torch.bfloat16, DEVICE).leaves()
    weight = torch.randn_like(problem.operands["q"])

    def step() -> tuple[Tensor, ...]:
        out = gather_attention(**problem.operands, **problem.layout, backend=backend)
        return (out, *torch.autograd.grad((out * weight).sum(), list(problem.operands.values())))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        problem.operands["q"].mul_(0.5)
    graph.replay()
    for one, expected in zip(captured, step(), strict=True):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("backend", OWN)
def test_checking_mode_names_a_bad_index(backend: str) -> None:
    require(backend)
    problem = PROBLEMS["one token"].to(torch.bfloat16, DEVICE)
    layout = {**problem.layout, "ref_indices": torch.tensor([7], device=DEVICE)}
    with pytest.raises(LayoutError, match=r"lie in \[0, 1\), got values from 7 to 7"):
        Problem(problem.operands, layout).run(backend, check=True)

"""Offsets that the host knows: nobody reads them from the device, and what is computed is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.errors import LayoutError
from sparse_ref_attn.functional import HostOffsets, attention_mass_varlen, gather_attention
from sparse_ref_attn.ops.gather_attention.arguments import Arguments, HostLayout
from sparse_ref_attn.ops.gather_attention.gradients import Wanted
from sparse_ref_attn.ops.gather_attention.impl import flash, sdpa
from sparse_ref_attn.ops.gather_attention.normal_form import normalise
from tests.device_reads import device_reads
from tests.ops.problems import NAMES, Problem, gradients, grid, make

PROBLEMS = grid(16)
OFFSETS = ("cu_seqlens_q", "cu_seqlens_k", "ref_offsets")


def known(problem: Problem) -> HostOffsets:
    return HostOffsets(*(problem.layout[n].tolist() if n in problem.layout else None for n in OFFSETS))


def normal(problem: Problem, host: HostOffsets | None) -> Arguments:
    layout = [problem.layout.get(n) for n in ("ref_indices", "ref_offsets", "cu_seqlens_q", "cu_seqlens_k")]
    return normalise(*(problem.operands.get(n) for n in NAMES), *layout, None, False, host)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_bits_and_gradients(name: str) -> None:
    problem = PROBLEMS[name].to(torch.float32)
    plain, told = problem.leaves(), problem.leaves()
    host = known(problem)
    want, got = plain.run("sdpa"), told.run("sdpa", host=host)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    for a, b in zip(gradients(plain, *want).values(), gradients(told, *got).values(), strict=True):
        assert torch.equal(a, b)
    assert HostLayout.of(normal(problem, host)) == HostLayout.read(normal(problem, None))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_nothing_is_read_forward_or_backward(name: str, backend: str) -> None:
    problem = PROBLEMS[name].leaves()
    host = known(problem)
    with device_reads() as reads:
        out = problem.run(backend, host=host)
        gradients(problem, *out)
    assert reads == []


def test_without_them_every_layer_reads() -> None:
    problem = PROBLEMS["ragged items, one bank"].leaves()
    with device_reads() as reads:
        gradients(problem, *problem.run("sdpa"))
    assert {"arguments.py:read tolist"} == set(reads)
    assert len(reads) == 6  # three offsets, forward and backward


def test_batched_operands_and_whole_packed_ones_need_none() -> None:
    q, k = torch.randn(2, 5, 2, 16, requires_grad=True), torch.randn(2, 7, 2, 16, requires_grad=True)
    bank = torch.randn(9, 2, 16, requires_grad=True)
    rows = torch.tensor([[0, 3], [8, 1]])
    with device_reads() as reads:
        gather_attention(q, k, k, bank, bank, rows).sum().backward()
        gather_attention(q[0], k[0], k[0], bank, bank, rows[0]).sum().backward()
    assert reads == []


@pytest.mark.parametrize("name", ["text and image rows apart", "two dense tensors, grouped heads", "empty items",
                                  "rows named twice", "a selection per key head"])  # fmt: skip
def test_tensors_without_numbers_are_never_read(name: str) -> None:
    """A meta tensor has no numbers: PyTorch raises where they are asked for."""
    problem = PROBLEMS[name].to(torch.float32)
    here = normal(problem, known(problem))
    a = here._replace(**{n: x.to("meta") for n, x in here._asdict().items() if isinstance(x, Tensor)})
    out, lse = sdpa.forward(a)
    assert out.shape == a.q.shape
    grads = sdpa.backward(a, torch.ones_like(out), torch.ones_like(lse), out, lse, Wanted(True, True, True))
    assert grads.q is not None
    assert grads.q.shape == a.q.shape
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        sdpa.forward(a._replace(host=None))


def test_flash_is_told_the_longest_item() -> None:
    problem = make(((63, 1, 34),), ((40, 2, 65),), (33, 0, 70), 80)
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple, scale: float) -> tuple[Tensor, Tensor]:
        seen.append(lengths[2:])
        return torch.zeros_like(q), q.new_zeros(q.shape[1::-1])

    for host in (known(problem), None):
        flash.forward_by(attend, normal(problem, host))
    assert seen == [(63, 135), (98, 210)]


def test_a_ragged_mass_reads_nothing() -> None:
    q, k = torch.randn(9, 2, 16), torch.randn(20, 2, 16)
    numbers = [[0, 4, 9], [0, 8, 20], [0, 3, 8], [5, 15]]
    tensors = [torch.tensor(x, dtype=torch.int32) for x in numbers]
    want = attention_mass_varlen(q, k, *tensors, 8)
    with device_reads() as reads:
        got = attention_mass_varlen(q, k, *tensors, 8, host=numbers)
    assert reads == []
    assert torch.equal(got, want)
    with pytest.raises(LayoutError, match=r"host must hold three times 3 and 2 numbers, got 3 and 3 and 3 and 3"):
        attention_mass_varlen(q, k, *tensors, 8, host=[*numbers[:3], [1, 2, 3]])
    with pytest.raises(LayoutError, match="host must say what the offsets hold"):
        attention_mass_varlen(q, k, *tensors, 8, host=[[0, 5, 9], *numbers[1:]], check=True)


def test_bad_numbers() -> None:
    problem = PROBLEMS["ragged items, one bank"]
    host = known(problem)
    with pytest.raises(
        LayoutError, match=r"host.cu_seqlens_q must hold the 1 x 4 numbers of cu_seqlens_q, got \[0, 65\]"
    ):
        problem.run("sdpa", host=host._replace(cu_seqlens_q=[0, 65]))
    with pytest.raises(LayoutError, match=r"cu_seqlens_q must end at the 65 rows of q, got 64"):
        problem.run("sdpa", host=host._replace(cu_seqlens_q=[0, 33, 34, 64]))
    with pytest.raises(LayoutError, match="host must say what the offsets hold"):
        problem.run("sdpa", host=host._replace(cu_seqlens_q=[0, 30, 34, 65]), check=True)
    dense = PROBLEMS["dense alone"]
    with pytest.raises(LayoutError, match=r"host.ref_offsets must hold the no numbers of ref_offsets"):
        dense.run("sdpa", host=HostOffsets(ref_offsets=[0, 1]))

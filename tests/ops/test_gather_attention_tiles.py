"""Selections of query tiles, by the definition and the SDPA backend, against dense attention in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.functional import HostOffsets, gather_attention
from sparse_ref_attn.ops.gather_attention.impl import sdpa_tiles
from sparse_ref_attn.ops.gather_attention.registered import forward_op
from tests.device_reads import device_reads

from .problems import Problem, gradients, truth
from .test_gather_attention import same
from .tile_problems import make_tiles, ragged_tiles, tile_grid

PROBLEMS = tile_grid(16)


def known(problem: Problem) -> HostOffsets:
    names = ("cu_seqlens_q", "cu_seqlens_k", "ref_offsets", "cu_tiles")
    return HostOffsets(*(problem.layout[n].tolist() if n in problem.layout else None for n in names))


@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_output_and_lse_equal_dense_attention(name: str, backend: str) -> None:
    for got, want in zip(PROBLEMS[name].run(backend), truth(PROBLEMS[name]), strict=True):
        same(got, want)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=ragged_tiles(st.integers(0, 20), 30, st.sampled_from([8, 24])))
def test_fuzz_of_ragged_tiles(problem: Problem) -> None:
    for backend in ("reference", "sdpa"):
        for got, want in zip(problem.run(backend), truth(problem), strict=True):
            same(got, want)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_the_definition(name: str) -> None:
    problem, exact = PROBLEMS[name].leaves(), PROBLEMS[name].leaves()
    want = gradients(exact, *truth(exact))
    got = gradients(problem, *problem.run("reference"))
    for tensor in want:
        same(got[tensor], want[tensor])


@pytest.mark.parametrize(("held", "copied"), [(1, 1), (3000, 700), (100000, 1), (1, 100000)])
def test_as_many_tiles_at_once_as_may_be_held(held: int, copied: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sdpa_tiles.SCORES, "cpu", held)
    monkeypatch.setitem(sdpa_tiles.COPIED, "cpu", copied)
    for name in ("tiles alike", "ragged tiles of ragged items"):
        for got, want in zip(PROBLEMS[name].run("sdpa"), truth(PROBLEMS[name]), strict=True):
            same(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_errs_no_more_than_twice_pytorch_itself(dtype: torch.dtype) -> None:
    problem = make_tiles(((16, 16, 33), (7,)), ((20, 41),), (30, 30, 9, 30), 60, means=(9, 4), heads=3, channels=64)
    problem = problem.to(dtype)
    problem.layout["bias"] = problem.layout["bias"].float()
    exact = truth(problem.to(torch.float64))
    errors = {}
    for backend in ("reference", "sdpa"):
        out, lse = problem.run(backend)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        errors[backend] = [
            float((got.double() - want).abs().max()) for got, want in zip((out, lse), exact, strict=True)
        ]
    slack = 2 * torch.finfo(dtype).eps
    assert all(got <= 2 * allowed + slack for got, allowed in zip(*reversed(errors.values()), strict=True))


def test_tiles_that_all_read_the_same_are_the_item() -> None:
    rows = torch.tensor([4, 0, 7, 2])
    problem = make_tiles(((3, 16, 5), (16,)), ((6, 4),), (4, 4, 4, 4), 9, seed=3)
    o, cu = problem.operands, problem.layout
    tiled = gather_attention(
        **o, ref_indices=rows.expand(4, 4), cu_tiles=cu["cu_tiles"], cu_seqlens_q=cu["cu_seqlens_q"],
        cu_seqlens_k=cu["cu_seqlens_k"],
    )  # fmt: skip
    whole = gather_attention(
        **o, ref_indices=rows.expand(2, 4), cu_seqlens_q=cu["cu_seqlens_q"], cu_seqlens_k=cu["cu_seqlens_k"]
    )
    same(tiled, whole)


def test_the_order_of_kept_rows_and_of_tiles_does_not_matter() -> None:
    problem = make_tiles(((3, 16, 5),), ((6,),), (4, 5, 3), 9, means=(4,), seed=3)
    o, layout = problem.operands, problem.layout
    order = [2, 0, 1]
    q, rows = o["q"].split([3, 16, 5]), layout["ref_indices"].split([4, 5, 3])
    moved = Problem(
        o | {"q": torch.cat([q[t] for t in order])},
        layout
        | {
            "cu_tiles": torch.tensor([0, 5, 8, 24]),
            "ref_indices": torch.cat([rows[t].flip(0) for t in order]),
            "ref_offsets": torch.tensor([0, 3, 7, 12]),
            "bias": layout["bias"][order],
        },
    )
    for backend in ("reference", "sdpa"):
        outs = moved.run(backend)[0].split([5, 3, 16])
        same(torch.cat([outs[1], outs[2], outs[0]]), problem.run(backend)[0])


def test_no_bias_is_a_bias_of_zero_and_columns_beyond_k2_are_not_read() -> None:
    problem = make_tiles(((3, 16), (16,)), ((6, 4),), (4, 3, 2), 9, means=(5, 2))
    shape = problem.layout["bias"].shape
    plain = Problem(problem.operands, {n: x for n, x in problem.layout.items() if n != "bias"})
    wide = torch.zeros(shape[0], 9)
    wide[:2, 5:], wide[2:, 2:] = float("nan"), float("nan")
    zero = Problem(problem.operands, {**problem.layout, "bias": wide[:, :7]})
    for backend in ("reference", "sdpa"):
        for got, want in zip(zero.run(backend), plain.run(backend), strict=True):
            same(got, want)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_batched_operands_and_banks_equal_packed_ones(backend: str) -> None:
    problem = make_tiles(((3, 5), (4, 4)), ((6, 6),), (4, 3, 2, 0), 18, means=(5, 5))
    out, lse = problem.run(backend)
    o = {n: x.unflatten(0, (2, -1)) for n, x in problem.operands.items()}
    layout = {n: problem.layout[n] for n in ("ref_indices", "ref_offsets", "cu_tiles", "bias")}
    got, got_lse = gather_attention(**o, **layout, return_lse=True, backend=backend)
    same(got.flatten(0, 1), out)
    same(got_lse.transpose(0, 1).flatten(1), lse)


@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_is_read_where_the_host_knows(name: str) -> None:
    problem = PROBLEMS[name]
    want, host = problem.run("sdpa"), known(problem)
    with device_reads() as reads:
        got = problem.run("sdpa", host=host)
    assert reads == []
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with device_reads() as reads:
        problem.run("sdpa", host=host._replace(tiles=None))
    assert "arguments.py:read tolist" in reads


@pytest.mark.parametrize("operand", ["q", "v", "k2", "k_ref"])
def test_gradients_are_refused_but_by_the_definition(operand: str) -> None:
    problem = make_tiles(((3, 16),), ((6,),), (4, 3), 9, means=(5,))
    problem.operands[operand].requires_grad_()
    with pytest.raises(ConfigError, match='through cu_tiles are computed by backend="reference" alone'):
        problem.run("sdpa")
    with torch.no_grad():
        assert not problem.run("sdpa")[0].requires_grad
    assert problem.run("reference")[0].requires_grad
    a = [problem.operands.get(n) for n in ("q", "k", "v", "k2", "v2", "k_ref", "v_ref")]
    a += [problem.layout[n] for n in ("cu_seqlens_q", "cu_seqlens_k", "ref_indices", "ref_offsets")]
    with pytest.raises(ConfigError, match="through cu_tiles"):
        forward_op(*a, 0.25, False, None, problem.layout["cu_tiles"], problem.layout["bias"], "sdpa", False)


@pytest.mark.parametrize("backend", ["flash", "flex", "cuda"])
def test_backends_without_tiles_say_so(backend: str) -> None:
    with pytest.raises(ConfigError, match=rf"{backend}: .*cannot give each query tile a selection of its own"):
        PROBLEMS["tiles alike"].run(backend)


def test_opcheck() -> None:
    for name in ("biased rows of parts and grouped heads", "a selection per key head", "a tile without keys"):
        problem = PROBLEMS[name]
        tensors = [problem.operands.get(n) for n in ("q", "k", "v", "k2", "v2", "k_ref", "v_ref")]
        layout = [problem.layout.get(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "ref_indices", "ref_offsets")]
        tiles = problem.layout["cu_tiles"], problem.layout.get("bias")
        torch.library.opcheck(forward_op, (*tensors, *layout, 0.25, False, None, *tiles, "sdpa", False))


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    call = torch.compile(gather_attention, fullgraph=True, backend=counter)
    for n in (5, 6, 9, 13):
        problem = make_tiles(((n, 16, n + 3),), ((7 + n,),), (4, n, 3), 2 * n, means=(5 + n,))
        same(call(**problem.operands, **problem.layout), truth(problem)[0])
    assert counter.frame_count <= 2  # the first lengths, then any


def spoil(**changes: object) -> dict[str, object]:
    problem = make_tiles(((3, 16), (5,)), ((6, 2),), (4, 3, 2), 9, means=(5, 2))
    return {**problem.operands, **problem.layout, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_tiles": None}, "bias has a row for each query tile and needs cu_tiles"),
        ({"cu_tiles": None, "bias": None}, r"must be \(B \+ 1,\) or \(G, B \+ 1\) for 2 items, got \(1, 4\)"),
        ({"cu_tiles": torch.zeros(4)}, "cu_tiles must be int32 or int64"),
        ({"cu_tiles": torch.zeros(1, dtype=torch.int32)}, r"cu_tiles must be \(T \+ 1,\) for at least one tile"),
        ({"cu_tiles": torch.tensor([0, 3, 24]), "bias": torch.zeros(2, 5)}, r"must be \(T \+ 1,\) .* for 2 tiles"),
        ({"cu_tiles": torch.tensor([0, 3, 19, 23])}, "cu_tiles must end at the 24 rows of q, got 23"),
        ({"cu_tiles": torch.tensor([0, 19, 3, 24])}, "cu_tiles must not decrease"),
        ({"cu_tiles": torch.tensor([0, 3, 20, 24])}, "so that no tile crosses an item, got none at row 19"),
        ({"ref_offsets": None}, r"ref_indices of 3 tiles must come with ref_offsets, or as \(T, K\), got \(9,\) alone"),
        ({"k2": None, "v2": None, "cu_seqlens_k": torch.tensor([0, 6, 8])}, "bias is added to the scores of k2"),
        ({"bias": torch.zeros(3, 5, dtype=torch.float64)}, "bias must be float32"),
        ({"bias": torch.zeros(2, 5)}, r"bias must be \(3, W\), contiguous in its last dimension, got \(2, 5\)"),
        ({"bias": torch.zeros(5, 3).t()}, r"bias must be \(3, W\), .* with strides \(1, 3\)"),
        ({"bias": torch.zeros(3, 4)}, "bias must have a column for each of an item's 5 k2 rows, got 4"),
        ({"ref_indices": None, "ref_offsets": None, "k_ref": None, "v_ref": None, "bias": None}, "with neither"),
        ({"host": HostOffsets(tiles=[0, 24])}, r"host.tiles must hold the 1 x 4 numbers of cu_tiles, got \[0, 24\]"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes: dict[str, object], message: str) -> None:
    for backend in ("sdpa", "reference"):
        with pytest.raises(LayoutError, match=message):
            gather_attention(**spoil(**changes), backend=backend)

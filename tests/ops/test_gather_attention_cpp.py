"""Query tiles by the C++ kernel, against dense attention in float64, for each target that it is compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.functional import gather_attention
from sparse_ref_attn.kernels.cpu_abi import TARGETS, AttendTilesArgs
from sparse_ref_attn.kernels.cpu_library import CpuLibrary
from sparse_ref_attn.ops.gather_attention import backends
from sparse_ref_attn.ops.gather_attention.backends import Call, reasons
from sparse_ref_attn.ops.gather_attention.registered import forward_op
from tests.cpu_kernels import library_at, used

from .problems import Problem, truth
from .rounding import assert_rounded, of_attention
from .tile_problems import make_tiles, ragged_tiles, tile_grid
from .tolerance import assert_as_accurate

PROBLEMS = tile_grid(40)
TILED = Call(torch.device("cpu"), torch.float32, 64, tiles=4)


@pytest.fixture(params=range(len(TARGETS)), ids=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[CpuLibrary]:
    with used(request.param) as library:
        yield library


@pytest.fixture
def cpp() -> Iterator[CpuLibrary]:
    with used() as library:
        yield library


def in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    low = problem.to(dtype)
    return Problem(low.operands, problem.layout, low.options)


def check(problem: Problem, deviation: dict[str, torch.Tensor] | None = None) -> None:
    """In float32, to its roundings."""
    low = in_dtype(problem, torch.float32)
    deviation = deviation or of_attention(low)
    for name, got, want in zip(("out", "lse"), low.run("cpp"), truth(in_dtype(low, torch.float64)), strict=True):
        assert_rounded(got, want, deviation[name], name)


@cache
def roundings(name: str) -> dict[str, torch.Tensor]:
    """What is allowed to a problem, whatever the target."""
    return of_attention(in_dtype(PROBLEMS[name], torch.float32))


@pytest.mark.parametrize("name", PROBLEMS)
def test_output_and_lse_equal_dense_attention(name: str, target: CpuLibrary) -> None:
    check(PROBLEMS[name], roundings(name))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=ragged_tiles(st.sampled_from([0, 1, 7, 16, 33, 40]), 40, st.sampled_from([8, 24])))
def test_fuzz_of_ragged_tiles(problem: Problem) -> None:
    with used():
        check(problem)


@pytest.mark.parametrize("name", PROBLEMS)
def test_bfloat16_errs_no_more_than_twice_pytorch_itself(name: str, target: CpuLibrary) -> None:
    low = in_dtype(PROBLEMS[name], torch.bfloat16)
    exact = truth(in_dtype(low, torch.float64))
    for part, got, want, plain in zip(("out", "lse"), low.run("cpp"), exact, low.run("reference"), strict=True):
        assert got.dtype == (torch.bfloat16 if part == "out" else torch.float32)
        assert_as_accurate(got, want, plain, part)


def test_many_keys_of_many_heads(cpp: CpuLibrary) -> None:
    """Sums of many terms, and all channels of a real model."""
    check(make_tiles(((9, 4),), ((40,),), (1500, 33), 1600, means=(70,), heads=4, key_heads=2, channels=128, seed=5))


def test_indices_and_offsets_of_either_size(cpp: CpuLibrary) -> None:
    problem = in_dtype(PROBLEMS["biased rows of parts and grouped heads"], torch.float32)
    want = problem.run("cpp")
    whole = {n: x.long() if not x.is_floating_point() else x for n, x in problem.layout.items()}
    half = {n: x.int() if not x.is_floating_point() else x for n, x in problem.layout.items()}
    for layout in (whole, half):
        got = Problem(problem.operands, layout).run("cpp")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_where_they_lie(dtype: torch.dtype, cpp: CpuLibrary) -> None:
    """Slices of wider buffers whose other channels are NaN, at any address; and rows that lie side by side."""
    problem = in_dtype(PROBLEMS["biased rows of parts and grouped heads"], dtype)
    want = problem.run("cpp")
    apart = {}
    for name, x in problem.operands.items():
        rows, heads, channels = x.shape
        wide = torch.full((rows, heads + 1, channels + 3), float("nan"), dtype=dtype)
        wide[:, :heads, 1 : 1 + channels] = x
        apart[name] = wide[:, :heads, 1 : 1 + channels]
    got = Problem(apart, problem.layout).run("cpp")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    together = {n: x.transpose(0, 1).contiguous().transpose(0, 1) for n, x in problem.operands.items()}
    got = Problem(together, problem.layout).run("cpp")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_batched_operands_and_banks_equal_packed_ones(cpp: CpuLibrary) -> None:
    problem = in_dtype(make_tiles(((3, 5), (4, 4)), ((6, 6),), (4, 3, 2, 0), 18, means=(5, 5)), torch.float32)
    out, lse = problem.run("cpp")
    o = {n: x.unflatten(0, (2, -1)) for n, x in problem.operands.items()}
    layout = {n: problem.layout[n] for n in ("ref_indices", "ref_offsets", "cu_tiles", "bias")}
    got, got_lse = gather_attention(**o, **layout, return_lse=True, backend="cpp")
    torch.testing.assert_close(got.flatten(0, 1), out)
    torch.testing.assert_close(got_lse.transpose(0, 1).flatten(1), lse)


def test_the_same_bits_with_any_number_of_threads(cpp: CpuLibrary) -> None:
    problem = make_tiles(((150, 16, 70, 1),), ((40,),), (210, 33, 5, 0), 300, means=(70,), heads=6, channels=64)
    problem = in_dtype(problem, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results += [problem.run("cpp")] * 2
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for each in results[1:] for a, b in zip(each, results[0], strict=True))


def test_a_nan_stays_with_its_query(cpp: CpuLibrary) -> None:
    problem = in_dtype(PROBLEMS["tiles alike"], torch.float32)
    problem.operands["q"][17, 1, 3] = float("nan")
    out, lse = problem.run("cpp")
    bad = torch.zeros(64, 2, dtype=torch.bool)
    bad[17, 1] = True
    assert torch.equal(out.isnan().all(2), bad)
    assert torch.equal(out.isnan().any(2), bad)
    assert torch.equal(lse.isnan().t(), bad)


def test_exp2_is_right_to_two_units_of_the_last_place(target: CpuLibrary) -> None:
    x = torch.cat([torch.linspace(-126, 0, 1 << 20), -torch.logspace(-45, 2, 1 << 16, base=2.0), torch.zeros(16)])
    y = torch.empty_like(x)
    target.exp2(x.data_ptr(), y.data_ptr(), x.numel())
    want = x.double().exp2()
    unit = torch.finfo(torch.float32).eps * want.log2().floor().exp2()
    assert float(((y.double() - want).abs() / unit).max()) <= 2
    gone = torch.tensor([-126.001, -1e5, -3e38, float("-inf")] * 4)
    target.exp2(gone.data_ptr(), y.data_ptr(), 16)
    assert torch.equal(y[:16], torch.zeros(16))
    unknown = torch.full((16,), float("nan"))
    target.exp2(unknown.data_ptr(), y.data_ptr(), 16)
    assert y[:16].isnan().all()


def test_auto_takes_it_where_it_can(cpp: CpuLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = backends.implementation
    monkeypatch.setattr(
        "sparse_ref_attn.ops.gather_attention.registered.implementation", lambda n: taken.append(n) or real(n)
    )
    problem = PROBLEMS["tiles alike"]
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        in_dtype(problem, dtype).run("auto")
    gather_attention(*(torch.zeros(3, 2, 8) for _ in range(3)))
    assert taken == ["cpp", "cpp", "sdpa", "sdpa", "sdpa"]


def test_what_it_cannot_do_is_said_in_words(cpp: CpuLibrary) -> None:
    assert reasons("cpp", TILED) == []
    assert reasons("cpp", TILED._replace(tiles=0)) == ["serves selections of query tiles alone"]
    assert reasons("cpp", TILED._replace(dtype=torch.float16, channels=12)) == [
        "needs bfloat16 or float32, got torch.float16", "needs a head dim that is a multiple of 8, got 12",
    ]  # fmt: skip
    assert reasons("cpp", TILED._replace(device=torch.device("meta"))) == ["needs a CPU, got meta"]
    with pytest.raises(ConfigError, match=r"cpp: needs bfloat16 or float32, got torch\.float64"):
        PROBLEMS["tiles alike"].run("cpp")


def test_without_the_library_all_is_as_it_was(tmp_path: Path) -> None:
    problem = in_dtype(PROBLEMS["tiles alike"], torch.float32)
    with library_at(tmp_path / "none.so"):
        got, want = problem.run("auto"), problem.run("sdpa")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        with pytest.raises(
            ConfigError, match="cpp: the library of C\\+\\+ kernels must be built first, got none; `sra bui"
        ):
            problem.run("cpp")
    (tmp_path / "text.so").write_text("no library")
    with library_at(tmp_path / "text.so"):
        assert torch.equal(problem.run("auto")[0], want[0])
        assert "must be a library of these kernels" in reasons("cpp", TILED)[0]


def test_a_kernel_that_is_wrong_here_is_not_used(
    cpp: CpuLibrary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def twice(arguments: AttendTilesArgs, room: int, size: int) -> None:
        CpuLibrary.attend_tiles(cpp, arguments, room, size)
        arguments.carry = 1
        CpuLibrary.attend_tiles(cpp, arguments, room, size)

    monkeypatch.setattr(cpp, "attend_tiles", twice)
    problem = in_dtype(PROBLEMS["tiles alike"], torch.float32)
    for _ in range(2):
        assert torch.equal(problem.run("auto")[0], problem.run("sdpa")[0])
    assert len(caplog.messages) == 1
    assert "gather_attention by cpp is unusable and will not be used: " in caplog.messages[0]
    with pytest.raises(ConfigError, match=r"cpp: differs from float64 here: \w+: error \d.* is allowed"):
        problem.run("cpp")


def test_the_c_functions_refuse_in_words(cpp: CpuLibrary) -> None:
    good = {"dtype": 2, "channels": 8, "heads": 4, "key_heads": 2, "threads": 1, "scale": 1.0}
    for changes, error, message in (
        ({"dtype": 0}, ConfigError, r"dtype must be SRA_FLOAT32 \(2\) or SRA_BFLOAT16 \(1\), got 0"),
        ({"channels": 12}, ConfigError, "channels must be a multiple of 8, got 12"),
        ({"key_heads": 3}, LayoutError, "key_heads must divide heads, got 3 and 4"),
        ({"threads": 0}, LayoutError, "threads must be at least 1, got 0"),
        ({"selections": 4}, LayoutError, "selections must be 0, 1 or key_heads, got 4"),
        ({"scale": 0.0}, ConfigError, "scale must be positive and finite, got 0"),
        ({}, LayoutError, "must be given, got NULL"),
    ):
        with pytest.raises(error, match=message):
            cpp.room(AttendTilesArgs(**{**good, **changes}))


def test_opcheck(cpp: CpuLibrary) -> None:
    problem = in_dtype(PROBLEMS["biased rows of parts and grouped heads"], torch.float32)
    tensors = [problem.operands.get(n) for n in ("q", "k", "v", "k2", "v2", "k_ref", "v_ref")]
    layout = [problem.layout.get(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "ref_indices", "ref_offsets")]
    tiles = problem.layout["cu_tiles"], problem.layout["bias"]
    torch.library.opcheck(forward_op, (*tensors, *layout, 0.25, False, None, *tiles, "cpp", False))

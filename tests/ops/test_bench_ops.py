"""The benchmark of the ops runs, and its rows say what they should."""

from __future__ import annotations

import csv
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import op_rivals, results
from benchmarks.bench_ops import COLUMNS
from benchmarks.cli import main
from benchmarks.op_calls import Attention, Mass, TileMass
from benchmarks.op_methods import Method, refused
from benchmarks.op_shapes import MODELS, quick
from benchmarks.tile_calls import Tiled
from tests.cpu_kernels import library_at

CPU = torch.device("cpu")
RESULTS = Path(results.__file__).parent / "results" / "ops_cpu.csv"


def attention(dtype: torch.dtype = torch.float32) -> Attention:
    return Attention(quick(MODELS["kontext"]), 0.25, CPU, dtype)


def test_rows_of_a_quick_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    asked = ["ops", "--quick", "--kept", "0.25", "--rounds", "2", "--backward", "--heads", "2"]
    with library_at(tmp_path / "none.so"):
        assert main([*asked, "--out", str(out)]) == 0
    rows = results.read(out)
    told = capsys.readouterr().out
    forward = {row["method"]: row for row in rows if row["direction"] == "forward" and row["op"] == "gather_attention"}
    assert set(forward) == {"dense", "index_select + sdpa", "ours (auto)", "ours (sdpa)"}
    assert forward["ours (auto)"]["kept"] == "64"
    assert forward["index_select + sdpa"]["of_hand"] == forward["dense"]["of_bound"] == "1"
    assert sum(row["direction"] == "forward + backward" for row in rows) == 4
    assert "ours (triton): the backend must be able to do the call" in told
    for name in (*op_rivals.DENSE, *op_rivals.ATTENTION, *op_rivals.MASS):
        assert f"  {name}: needs " in told
    for side in (4, 8):
        tiles = {row["method"]: row for row in rows if row["op"] == f"gather_attention, tiles {side} x {side}"}
        assert set(tiles) == {"dense", "sdpa with a mask", "ours (auto)", "ours (sdpa)"}
        assert (tiles["ours (auto)"]["kept"], tiles["sdpa with a mask"]["of_hand"]) == ("32", "1")
    mass = {row["method"] for row in rows if row["op"] == "attention_mass"}
    assert mass == {
        "softmax by hand", "ours (auto)", "ours (auto), LSE given", "ours (auto), every 4th query",
        "ours (auto), LSE given, tiles of 16", "ours (auto), LSE given, tiles of 64",
    }  # fmt: skip
    assert list(rows[0]) == list(COLUMNS)
    assert main([*asked, "--out", str(out), "--resume"]) == 0
    assert len(results.read(out)) == len(rows)


def test_a_wrong_method_does_not_pass_its_gate() -> None:
    call = attention()
    calls = call, Tiled(call, 4), Mass(call), TileMass(call, 16)
    for one in calls:
        ours = partial(one.ours, "auto")
        assert refused(Method(ours, one, 1.0), one.plain()) is None
        assert "allows" in str(refused(Method(lambda ours=ours: ours() * 1.01, one, 1.0), one.plain()))


def packed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(T, H, C) each, one item."""
    return scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)


class Paged:
    """FlashInfer's wrapper, by its documented shapes and places of arguments."""

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert kv_layout == "NHD"
        assert workspace.dtype == torch.uint8

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool, q_data_type: object,
    ) -> None:  # fmt: skip
        assert (page_size, causal) == (1, False)
        assert paged_kv_last_page_len.tolist() == [1]
        assert paged_kv_indptr.tolist() == [0, paged_kv_indices.shape[0]]
        self.pages, self.shape = paged_kv_indices, (qo_indptr.tolist()[-1], num_qo_heads, head_dim_qk)

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        assert q.shape == self.shape
        return packed_attention(q, *(pool[self.pages.long(), 0] for pool in cache))


def colreduce(query: Tensor, key: Tensor, reduction: str) -> Tensor:
    assert reduction == "mean"
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(2)


@pytest.mark.parametrize("name", ["flashinfer", "flash_colreduce", "flash_attn", "flash_attn_interface"])
def test_what_is_done_around_a_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain attention stands in the package's place; the package itself needs a card."""
    package = ModuleType(name)
    package.BatchPrefillWithPagedKVCacheWrapper = Paged
    package.flash_colreduce = colreduce
    package.flash_attn_func = lambda q, k, v: packed_attention(q[0], k[0], v[0])[None]
    monkeypatch.setitem(sys.modules, name, package)
    call: Attention | Mass = attention()
    rivals = op_rivals.ATTENTION
    if name == "flash_colreduce":
        call, rivals = Mass(attention()), op_rivals.MASS
    rival = next(rival for rival in rivals.values() if rival.package == name)
    assert refused(Method(rival.prepare(call), call, 1.0), call.plain()) is None


def test_varlen_attn_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        assert cu_q.tolist() == [0, max_q] == [0, q.shape[0]]
        assert cu_k.tolist() == [0, max_k] == [0, k.shape[0]]
        return packed_attention(q, k, v)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    call = attention()
    assert refused(Method(op_rivals.varlen(call), call, 1.0), call.plain()) is None


def test_flex_attention_with_keys_for_queries_is_the_mass() -> None:
    call = Mass(attention())
    assert refused(Method(op_rivals.swapped_flex(call, flex_attention), call, 1.0), call.plain()) is None


def test_flex_attention_over_the_gathered_rows() -> None:
    call = attention()

    def attend(*operands: Tensor) -> Tensor:
        return flex_attention(*(x.detach() for x in operands))  # it has no backward on a CPU, and refuses

    assert refused(Method(op_rivals.flex(call, attend), call, 1.0), call.plain()) is None


def test_every_row_has_a_column() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert {shape.channels for shape in MODELS.values()} == {128}


def test_on_a_cpu_the_op_is_as_fast_as_attention_by_hand() -> None:
    with RESULTS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "ours (auto)" and row["direction"] == "forward"]
    rows = [row for row in rows if row["op"] == "gather_attention"]
    assert rows
    slow = [row for row in rows if float(row["of_hand"]) < 0.95]
    assert not slow

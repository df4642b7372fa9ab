"""What one runs most, timed on a CPU by pytest-benchmark: a few rounds at cut size, with the right answer.

``pytest tests/test_speed.py --benchmark-autosave`` keeps the times; ``--benchmark-compare`` puts others beside them.
Rows that are published come from ``python -m benchmarks``, never from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparse_ref_attn as sra
from benchmarks import random_pipelines
from benchmarks.op_calls import Attention, Mass
from benchmarks.op_rivals import by_hand, mass_by_hand
from benchmarks.op_shapes import MODELS, quick
from benchmarks.shapes import PipelineCase
from sparse_ref_attn.eval.embedded import kontext_pipeline
from sparse_ref_attn.functional import pack_rows, unpack_rows
from sparse_ref_attn.selection import Edges, References
from sparse_ref_attn.types import Reference, TokenLayout

CPU = torch.device("cpu")
Timed = Callable[..., Any]


@pytest.fixture
def timed(benchmark: Any) -> Timed:
    """``timed(call, **about)``: three rounds after one to warm up; what the call gives."""

    def run(call: Callable[[], Any], **about: Any) -> Any:
        benchmark.extra_info.update(about, torch=torch.__version__, threads=torch.get_num_threads())
        return benchmark.pedantic(call, rounds=3, warmup_rounds=1)

    return run


@pytest.fixture(scope="module")
def attention() -> Attention:
    return Attention(quick(MODELS["kontext"]), 0.25, CPU, torch.float32)


ATTENTION = {
    "dense": lambda call: (by_hand(call.dense()), call.dense()),
    "by hand": lambda call: (by_hand(call), call),
    "ours": lambda call: (lambda: call.ours("auto"), call),
}


@pytest.mark.benchmark(group="gather_attention")
@pytest.mark.parametrize("method", ATTENTION)
@torch.no_grad()
def test_gather_attention(timed: Timed, attention: Attention, method: str) -> None:
    run, call = ATTENTION[method](attention)
    out = timed(run, flops=call.flops, kept=call.kept)
    assert call.error(out) <= 2 * call.error(call.plain()) + 2 * torch.finfo(torch.float32).eps


@pytest.mark.benchmark(group="attention_mass")
@pytest.mark.parametrize("method", ["by hand", "ours"])
@torch.no_grad()
def test_attention_mass(timed: Timed, attention: Attention, method: str) -> None:
    call = Mass(attention)
    out = timed(mass_by_hand(call) if method == "by hand" else lambda: call.ours("auto"), flops=call.flops)
    assert call.error(out) <= 2 * call.error(call.plain()) + 2 * torch.finfo(torch.float32).eps


@pytest.mark.benchmark(group="pack_rows")
def test_pack_and_unpack(timed: Timed) -> None:
    x = torch.randn(1, 8192, 256)
    rows = torch.randperm(8192)[:2048].sort().values

    def there_and_back() -> torch.Tensor:
        return unpack_rows(pack_rows(x, rows), rows, 8192)

    out = timed(there_and_back, bytes=2 * x.nbytes // 4)
    assert torch.equal(out[:, rows], x[:, rows])
    assert out.count_nonzero() <= rows.numel() * x.shape[2]


@pytest.mark.benchmark(group="selection")
def test_edges_rank_a_photo(timed: Timed) -> None:
    layout = TokenLayout(2 * 4096, 512, (0, 4096), (Reference(4096, 4096, (64, 64)),))
    photo = torch.zeros(1, 3, 1024, 1024)
    photo[..., 512:, :] = 1.0
    (score,) = timed(lambda: Edges().score(References(layout, torch.zeros(1, 4096, 4), pixels=[photo])))
    best = score.argsort(descending=True)[:64] // 64
    assert set(best.tolist()) <= {31, 32}


@pytest.mark.benchmark(group="patch")
def test_patch_and_remove(timed: Timed) -> None:
    pipe = kontext_pipeline("tiny")
    timed(lambda: sra.patch(pipe).remove())
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("keep", [None, 0.05], ids=["dense", "edges 5%"])
@torch.no_grad()
def test_a_whole_call(timed: Timed, keep: float | None) -> None:
    """A quarter of a thousand tokens an image, four references: 4.1 times less work in all at 5 %, where T = 512."""
    case = PipelineCase("klein-4b", references=4, layers=0, single=1, steps=1, side=256, heads=2)
    pipe = random_pipelines.build(case, CPU, torch.float32)
    call = random_pipelines.caller(pipe, case)
    if keep is None:
        timed(call, reference_tokens=1024)
        return
    with sra.patched(pipe, sra.SparseRef("edges", keep)) as handle:
        timed(call, reference_tokens=51)
    assert handle.record.steps[0].kept == 4 * 13

"""References that leave from a block on equal the dense model whose later attentions do not see the dropped keys."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from diffusers import ContextParallelConfig, ParallelConfig

import sparse_ref_attn as sra
from sparse_ref_attn.models.flux2 import Flux2Adapter
from tests.adapters.test_dropping import KEEP, ROUNDING, error, noise, scores
from tests.adapters.witnesses import GENERATION, best, hidden_keys, witnessed
from tests.latents import CASES, each_case
from tests.pipelines import Case

BUILT = {"layers": 3, "single": 2}
ALIKE = {"kontext_inpaint": 3, "kontext_inpaint_reference": 1, "flux2": 4, "klein_inpaint": 1, "qwen_edit": 2,
         "qwen_edit_inpaint": 1}  # fmt: skip
"""Pipelines whose transformer another one has: a block for each."""
DEPTHS = [
    (name, block)
    for name in CASES
    if name != "klein_kv"
    for block in ((ALIKE[name],) if name in ALIKE else (1, 2) if name.startswith("qwen") else (1, 3, 4))
]


@pytest.mark.parametrize(("name", "block"), DEPTHS)
@torch.no_grad()
def test_equals_the_dense_model_with_keys_masked_from_that_block_on(name: str, block: int) -> None:
    """Double blocks, the first single block, and in the middle of either."""
    case = CASES[name]
    pipe = case.build(**BUILT)
    handle = sra.patch(pipe, sra.SparseRef(sra.FromFunction(noise), KEEP, from_block=block))
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, references=max(case.references), cfg=case.cfg, batch=max(case.batch), steps=1)
    sizes = handle.record.layout.sizes
    handle.remove()
    fresh = case.model(**BUILT)
    kept = best(scores(sizes), sizes, KEEP)
    rows = torch.cat([torch.ones(GENERATION).bool(), kept])
    assert len(calls) == 1 + case.cfg
    for call in calls:
        assert call.reached["hidden_states"].shape[1] == call.rows == GENERATION + len(kept)
        assert [a.k.shape[1] for a in call.attention] == [
            call.text + GENERATION + (len(kept) if i < block else int(kept.sum())) for i in range(len(call.attention))
        ]
        with hidden_keys(call, kept, from_block=block):
            wanted = fresh(**call.given)[0]
        assert call.sample.shape == wanted.shape
        assert error(call.sample[:, rows], wanted[:, rows]) < ROUNDING
        assert not call.sample[:, ~rows].any()
    for other in (0, block + 1):  # neither at the input nor a block later
        with hidden_keys(calls[0], kept, from_block=other):
            elsewhere = fresh(**calls[0].given)[0][:, :GENERATION]
        assert error(calls[0].sample[:, :GENERATION], elsewhere) > 10 * ROUNDING


def test_block_0_is_the_input() -> None:
    case = CASES["klein"]
    pipe = case.build()
    sra.patch(pipe, sra.SparseRef("grid", KEEP))
    wanted = case.call(pipe)
    sra.patch(pipe, sra.SparseRef("grid", KEEP, from_block=0))
    assert (wanted == case.call(pipe)).all()


@each_case(lambda case: case.name in ("kontext", "klein", "qwen_edit_plus_2511"))
def test_attention_is_measured_before_the_references_leave(case: Case) -> None:
    """A ranking by attention and a budget that rises: the profiling step is dense, the others leave at the block."""
    pipe = case.build(**BUILT)
    config = sra.SparseRef("mass", sra.Linear(0.2, 0.6), from_block=2)
    handle = sra.patch(pipe, config)
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, steps=3)
    record = handle.record
    assert [(step.kind, step.from_block) for step in record.steps] == [("profile", 0), ("sparse", 2), ("sparse", 2)]
    assert record.scores is not None
    ranked = torch.cat(record.scores).numpy()
    fresh = case.model(**BUILT)
    for call, share in zip(calls[1:], (0.4, 0.6), strict=True):
        kept = best(ranked, record.layout.sizes, share)
        with hidden_keys(call, kept, from_block=2), torch.no_grad():
            wanted = fresh(**call.given)[0]
        assert error(call.sample[:, :GENERATION], wanted[:, :GENERATION]) < ROUNDING


@pytest.mark.parametrize(
    ("block", "words"),
    [(-1, "at least 0, got -1"), (1.0, "int of at least 0, got 1.0"), (True, "got True")],
)
def test_a_block_that_is_none(block: object, words: str) -> None:
    with pytest.raises(sra.ConfigError, match=words):
        sra.SparseRef("grid", from_block=block)


def test_what_cannot_leave_by_depth_is_refused() -> None:
    klein = CASES["klein"].build()
    with pytest.raises(sra.ConfigError, match="below the model's 4 blocks, got 4"):
        sra.patch(klein, sra.SparseRef("grid", from_block=4))
    with pytest.raises(sra.ConfigError, match="from_block must be 0, got 1"):
        sra.SparseRef(sra.Downscale(), from_block=1)
    assert not klein.transformer._forward_hooks

    class Unknowing(Flux2Adapter):
        stacks: ClassVar[dict[str, str]] = {}

    with pytest.raises(sra.IncompatibleError, match="must say what its blocks are"):
        sra.patch(klein, sra.SparseRef("grid", from_block=1), adapter=Unknowing())
    case = CASES["klein_kv"]
    pipe = case.build()
    sra.patch(pipe, sra.SparseRef("grid", from_block=1))
    with pytest.raises(sra.IncompatibleError, match=r"stores the references' keys and values.*from_block=0"):
        case.call(pipe)


def test_a_part_of_the_rows_is_refused() -> None:
    """Context parallelism splits them behind the library's back."""
    case = CASES["klein"]
    pipe = case.build()
    sra.patch(pipe, sra.SparseRef("grid", from_block=1))
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    with pytest.raises(sra.IncompatibleError, match="every row of its own call, got context parallelism"):
        case.call(pipe)


def test_a_model_that_skips_its_later_blocks_is_noticed() -> None:
    case = CASES["klein"]
    pipe = case.build()
    sra.patch(pipe, sra.SparseRef("grid", from_block=2))
    pipe.transformer.register_forward_pre_hook(
        lambda module, args: setattr(module, "single_transformer_blocks", torch.nn.ModuleList())
    )
    with pytest.raises(sra.LayoutError, match="a later block must run in every call"):
        case.call(pipe)


def test_foreign_rows_are_refused() -> None:
    """Tokens that somebody adds on the way would be taken for others."""
    case = CASES["klein"]
    pipe = case.build()
    sra.patch(pipe, sra.SparseRef("grid", from_block=1))

    def add(module: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        return output[0], torch.cat([output[1], output[1][:, :1]], 1)

    pipe.transformer.transformer_blocks[0].register_forward_hook(add)
    with pytest.raises(sra.LayoutError, match=r"must get all 160 rows .* or the 88 kept ones, got 161"):
        case.call(pipe)

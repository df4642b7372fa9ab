"""How references share a budget, lengths are rounded, and the guard and the presets' tasks raise it, in whole runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn import schedules
from sparse_ref_attn.config import UniformGuard
from sparse_ref_attn.selection import References
from tests.adapters.witnesses import witnessed
from tests.latents import CASES
from tests.pairwise import pairwise
from tests.tiny_models import sharpen

KLEIN = CASES["klein"]


def rising(references: References) -> list[Tensor]:
    """Reference i's scores lie in (i, i + 1]: the last reference is the best."""
    return [i + torch.arange(1, size + 1) / size for i, size in enumerate(references.sizes)]


def counts(config: sra.SparseRef, references: int = 3, **request: Any) -> tuple[tuple[int, ...], sra.PatchHandle]:
    """Tokens kept of each reference at the last step."""
    pipe = KLEIN.build()
    handle = sra.patch(pipe, config)
    KLEIN.call(pipe, references=references, steps=2, **request)
    selection = handle.record.steps[-1].selection
    assert selection is not None
    assert handle.record.layout.sizes == (96, 64, 96)[:references]
    return selection.counts(), handle


def shared(keep: float | int, **settings: Any) -> sra.SparseRef:
    return sra.SparseRef(sra.FromFunction(rising), sra.Constant(keep, per="all"), **settings)


def test_a_share_each_or_a_shared_total() -> None:
    assert counts(sra.SparseRef(sra.FromFunction(rising), 0.25))[0] == (24, 16, 24)
    assert counts(sra.SparseRef(sra.FromFunction(rising), 20))[0] == (20, 20, 20)
    assert counts(shared(64))[0] == (0, 0, 64)
    assert counts(shared(0.5))[0] == (0, 32, 96)


def test_floors() -> None:
    assert counts(shared(64, floor=10))[0] == (10, 10, 44)
    assert counts(shared(64, floor=0.125))[0] == (12, 8, 44)
    assert counts(shared(5, floor=10))[0] == (10, 10, 10)  # the budget is raised to them
    assert counts(sra.SparseRef(sra.FromFunction(rising), 5, floor=10))[0] == (10, 10, 10)


def test_weights_move_the_shares() -> None:
    scored = {w: np.concatenate([w[i] * (i + np.arange(1, n + 1) / n - 1 / 96) for i, n in enumerate((96, 64, 96))])
              for w in ((1, 1, 1), (9, 1, 1), (1, 3, 1))}  # fmt: skip
    for weights, values in scored.items():
        best = np.sort(np.argsort(-values, kind="stable")[:64])
        wanted = tuple(int(((best >= a) & (best < b)).sum()) for a, b in ((0, 96), (96, 160), (160, 256)))
        assert counts(shared(64, weights=weights))[0] == wanted
    assert counts(shared(64, weights=(1, 1, 1)))[0] == counts(shared(64))[0]


@pairwise(name=["kontext", "klein", "qwen_edit_plus"], multiple=[1, 16, 37], per=["reference", "all"])
def test_the_joint_length_is_a_multiple(name: str, per: str, multiple: int) -> None:
    """Text, generation and kept tokens together, as attention sees them; never fewer tokens than the budget's."""
    case = CASES[name]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef("grid", schedules.Linear(0.2, 0.4, per=per), multiple=multiple))
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, references=max(case.references), steps=3)
    layout = handle.record.layout
    for call, step, share in zip(calls, handle.record.steps, (0.2, 0.3, 0.4), strict=True):
        sizes = layout.sizes if per == "reference" else (layout.reference_tokens,)
        asked = sum(int(share * size + 0.5 + 1e-9) for size in sizes)
        assert {a.k.shape[1] % multiple for a in call.attention} == {0}
        assert asked <= step.kept < asked + multiple


def test_rounding_up_past_the_references_keeps_all_of_them() -> None:
    case = CASES["kontext"]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef("grid", 0.9, multiple=1000))
    case.call(pipe)
    assert [step.kind for step in handle.record.steps] == ["dense"] * 3


def level(transformer: torch.nn.Module) -> None:
    """Make all keys zero, so that every attention is uniform."""
    for name, module in transformer.named_modules():
        if name.endswith((".norm_k", ".norm_added_k")):
            module.weight.data.zero_()


@pytest.mark.parametrize("per", ["reference", "all"])
def test_guard_raises_the_budget_where_the_mass_is_uniform(per: str) -> None:
    """Up to the tokens that hold 90 % of the mass, which is 90 % of them, in words; elsewhere it does nothing."""
    for uniform, top_quarter in ((True, 0.4), (False, 0.26)):
        pipe = KLEIN.build()
        if uniform:
            level(pipe.transformer)
        guard = UniformGuard(top_quarter, mass=0.9, dense_above=0.95)
        handle = sra.patch(pipe, sra.SparseRef("mass", sra.Constant(0.1, per=per), guard=guard))
        KLEIN.call(pipe, references=2, steps=2)
        if not uniform:
            assert not handle.notes
            assert handle.record.steps[-1].kept == 16
            continue
        assert handle.record.steps[-1].kept == 87 + 58
        (note,) = handle.notes
        assert "spread evenly (top 25 % of the tokens hold 25 % of the mass, below 40 %)" in note
        assert "at least 145 of 160 reference tokens are kept" in note
        assert note in " ".join(handle.summary().split())


@pytest.mark.parametrize("name", ["kontext", "klein_kv", "qwen_edit_plus"])
def test_guard_gives_dropping_up_where_it_would_keep_nearly_all(name: str) -> None:
    """A recolour's mass: dense to the end, bit for bit the unpatched pipeline, and a note that says why."""
    case = CASES[name]
    pipe, plain = case.build(), case.build()
    level(pipe.transformer)
    level(plain.transformer)
    handle = sra.patch(pipe, sra.ReCAST())
    image = case.call(pipe)
    assert np.array_equal(image, case.call(plain))
    assert {step.kept for step in handle.record.steps} == {handle.record.layout.reference_tokens}
    assert "spread evenly" in handle.notes[0]


@pytest.mark.parametrize(
    ("bounds", "wanted"), [({}, 48), ({"max_tokens": 20}, 20), ({"min_tokens": 60}, 60), ({"max_tokens": 0.25}, 24)]
)
def test_top_p_of_uniform_mass(bounds: dict[str, Any], wanted: int) -> None:
    pipe = KLEIN.build()
    level(pipe.transformer)
    handle = sra.patch(pipe, sra.SparseRef("mass", sra.TopP(0.5 - 1e-4, **bounds)))
    KLEIN.call(pipe, steps=3)
    assert [step.kept for step in handle.record.steps] == [96, wanted, wanted]


@pytest.mark.parametrize(
    ("config", "first", "scores"),
    [
        (sra.ReCAST(task="subject"), "profile", "mass"),
        (sra.ReCAST(task="style"), "profile", "mix"),
        (sra.ReCAST(task="auto", guard=None), "profile", "mass"),
        (sra.SparseContext(task="edit"), "sparse", "edges"),
        (sra.SparseContext(task="subject"), "sparse", "saliency"),
        (sra.SparseContext(task="style"), "sparse", "grid"),
        (sra.SparseContext(task="auto"), "profile", "edges"),
    ],
    ids=str,
)
def test_tasks_of_the_presets(config: sra.SparseRef, first: str, scores: str) -> None:
    handle = sra.patch(pipe := KLEIN.build(), config)
    if config.guard is not None:
        sharpen(pipe.transformer, 0)
    KLEIN.call(pipe, references=2)
    assert handle.record.steps[0].kind == first
    assert handle.record.config["select"]["kind"] == scores
    assert handle.record.scores is not None
    if config.guard is None:
        assert handle.record.steps[-1].kind == "sparse"
        assert not handle.notes
    else:
        assert "spread evenly" in handle.notes[0]

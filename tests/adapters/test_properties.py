"""Any configuration on any pipeline: it runs or says why not in the library's own errors, and leaves no trace."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import sparse_ref_attn as sra
from sparse_ref_attn import schedules
from sparse_ref_attn.config import UniformGuard
from sparse_ref_attn.selection import Ranking, Selector
from tests.adapters.witnesses import GENERATION, witnessed
from tests.latents import CASES
from tests.pipelines import Case

FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
MANY = settings(FEW, max_examples=600, derandomize=False)

ratios, tokens = st.floats(0.01, 1.0), st.integers(1, 64)  # the smallest reference has 64
pers = st.sampled_from(["reference", "all"])


@dataclass(frozen=True)
class Setting:
    """What a configuration has to fit, unless it is `spoiled`: then anything may come."""

    case: Case
    references: int
    steps: int
    spoiled: bool

    def choose(self, draw: st.DrawFn, good: list[Any], bad: list[Any]) -> Any:
        return draw(st.sampled_from(good + bad if self.spoiled else good))

    def probe(self, draw: st.DrawFn) -> tuple[Any, tuple[int, ...]]:
        """Blocks and steps to measure."""
        blocks = self.choose(draw, ["single", "all", "double", (0,), (0, 1)], [(1, 3), (0, 9)])
        return blocks, self.choose(draw, [(0,), (0,), tuple(range(min(2, self.steps)))], [(1,), (0, 5)])


def strange(references: Any) -> list[Any]:
    """Constant scores of the first reference, numpy's integers for the others, a wrong size for the third."""
    return [torch.zeros(n) if i == 0 else np.arange(n - (i == 2)) for i, n in enumerate(references.sizes)]


@st.composite
def leaves(draw: st.DrawFn, at: Setting) -> Selector:
    kind = draw(st.sampled_from(["mass", "mass", "self", "boxes", "grid", "random", "cosine", "edges", "function"]
                                + ["saved", "masks"] * at.spoiled))  # fmt: skip
    if kind == "mass":
        return sra.AttentionMass(*at.probe(draw), draw(st.integers(1, 70)), draw(st.booleans()))
    if kind == "self":
        return sra.SelfAttention(*at.probe(draw))
    if kind == "boxes":
        count = at.choose(draw, [at.references or 1], [1, 2])
        return sra.Boxes([draw(st.sampled_from([None, [(0.1, 0.2, 0.6, 0.9)]])) for _ in range(count)])
    if kind == "masks":
        return sra.SubjectMask([torch.eye(draw(st.sampled_from([8, 32])))] * at.references)
    if kind == "saved":
        scores = [torch.arange(size).float() for size in draw(st.sampled_from([(96,), (64,), (96, 64)]))]
        return sra.SavedRanking(Ranking(scores, [None] * len(scores), "model", "ab" * 32), draw(st.booleans()))
    if kind == "function":
        return sra.FromFunction(strange)
    return {
        "grid": sra.Grid(),
        "random": sra.Random(),
        "cosine": sra.Cosine(),
        "edges": sra.Edges(on_latents=at.choose(draw, ["use"], ["error"])),
    }[kind]


def selectors(at: Setting) -> st.SearchStrategy[Selector]:
    return st.one_of(
        leaves(at),
        st.lists(st.tuples(leaves(at), st.floats(0.1, 5)), min_size=1, max_size=3).map(sra.Mix),
        st.lists(leaves(at), min_size=1, max_size=3).map(sra.Union),
    )


@st.composite
def budgets(draw: st.DrawFn) -> schedules.Budget:
    per = draw(pers)
    low, high = sorted(draw(st.tuples(ratios, ratios) | st.tuples(tokens, tokens)))
    made = [
        sra.Constant(high, per),
        sra.Linear(low, high, per),
        sra.Polynomial(low, high, draw(st.floats(0.2, 4)), per),
        sra.Descending(high, low, per=per),
        sra.TopP(draw(ratios), *draw(st.sampled_from([(None, None), (low, None), (None, high), (low, high)])), per),
        sra.Pieces((low, high), (0.5,), per),
    ]
    budget = draw(st.sampled_from(made))
    return budget.piecewise(draw(st.integers(1, 3))) if draw(st.booleans()) else budget


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Any], Case, dict[str, Any]]:
    """Fields of SparseRef, a pipeline, and how it is called; one in four may be out of range."""
    case = draw(st.sampled_from(list(CASES.values())))
    request: dict[str, Any] = {
        "references": draw(st.sampled_from(((0,) if case.text_to_image else ()) + case.references)),
        "batch": draw(st.sampled_from(case.batch)),
        "steps": draw(st.sampled_from([3, 2, 1])),
        "cfg": case.cfg and draw(st.booleans()),
        "images_per_prompt": draw(st.sampled_from([1, 1, 2])),
        "seed": draw(st.integers(0, 2)),
        "first": draw(st.integers(0, 2)),
    }
    request["latents"] = case.latents and request["references"] > 0 and draw(st.booleans())
    at = Setting(case, request["references"], request["steps"], draw(st.sampled_from([False, False, False, True])))
    weights = [None, (1.0, 9.0, 0.5)[: at.references] or None]
    fields = {
        "select": draw(selectors(at)),
        "budget": draw(budgets()),
        "floor": at.choose(draw, [0, 0, 1, 13, 0.1, 0.5], [1.0, 70, 1.1]),
        "weights": at.choose(draw, weights, [(3.0,), (5, 1, 1), (0.0,)]),
        "multiple": draw(st.sampled_from([1, 1, 8, 64])),
        "guard": draw(st.one_of(st.none(), st.none(), st.builds(UniformGuard, st.floats(0.25, 1), st.floats(0.1, 1)))),
        "clock": draw(st.sampled_from(["steps", "sigma"])),
        "seed": draw(st.integers(0, 3)),
    }
    return fields, case, request


@cache
def pipeline(name: str) -> Any:
    """One for the whole test: whatever a configuration leaves behind, the next one trips over."""
    return CASES[name].build()


def traces(pipe: Any) -> list[str]:
    """What is left of a patch."""
    left = [name for name, m in pipe.transformer.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    left += [name for name, p in pipe.transformer.attn_processors.items() if "sparse" in str(p._attention_backend)]
    return left + ["vae.encode"] * ("encode" in vars(pipe.vae))


def check(fields: dict[str, Any], case: Case, request: dict[str, Any]) -> None:
    pipe = pipeline(case.name)
    note(f"{case.name} {request}")
    plain = case.call(pipe, **request)
    handle = None
    try:
        handle = sra.patch(pipe, sra.SparseRef(**fields))
        with witnessed(pipe.transformer) as calls:
            image = case.call(pipe, **request)
        if request["references"] == 0:
            assert np.array_equal(image, plain)
        else:
            agree(handle, calls, image, plain)
    except sra.SparseRefError as error:
        note(f"{type(error).__name__}: {error}")
    finally:
        if handle is not None:
            handle.remove()
    assert traces(pipe) == []
    assert np.array_equal(case.call(pipe, **request), plain)


def agree(handle: sra.PatchHandle, calls: list[Any], image: np.ndarray, plain: np.ndarray) -> None:
    """The image, the record and what reached the model agree."""
    record = handle.record
    size = record.layout.reference_tokens
    assert image.shape == plain.shape
    assert np.isfinite(image).all()
    assert sum(step.calls for step in record.steps) == len(calls)
    assert all(1 <= step.kept <= size for step in record.steps)
    per_step = len(calls) // len(record.steps)
    for i, call in enumerate(calls):
        step = record.steps[i // per_step]
        if step.kind != "cached":
            assert call.reached["hidden_states"].shape[1] == GENERATION + step.kept
        else:
            assert max(a.k.shape[1] for a in call.attention) == call.text + GENERATION + step.kept
    if all(step.kept == size for step in record.steps):
        assert np.array_equal(image, plain)
    json.loads(handle.summary("json"))
    assert "kept" in handle.summary()


@FEW
@given(runs())
def test_any_configuration_on_any_pipeline(run: tuple[dict[str, Any], Case, dict[str, Any]]) -> None:
    check(*run)


@pytest.mark.slow
@MANY
@given(runs())
def test_many_configurations_on_any_pipeline(run: tuple[dict[str, Any], Case, dict[str, Any]]) -> None:
    check(*run)

"""A ranking outlives its run: saved, loaded, compared, and used for another prompt without a profiling step."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.selection import Ranking
from tests.latents import CASES, each_case, in_turn
from tests.pipelines import Case

SHORT = {"steps": 2}
"""One step is profiled, and one follows it."""


@cache
def ranked(case: Case, seed: int = 0) -> Ranking:
    """Of a run of a new pipeline."""
    pipe = case.build()
    with sra.patched(pipe, sra.SparseRef("mass", 0.25)) as handle:
        case.call(pipe, references=max(case.references), seed=seed, **SHORT)
        return handle.ranking


@each_case(lambda case: case.name in in_turn(0, 3))
def test_used_for_another_run_without_profiling(case: Case, tmp_path: Path) -> None:
    """The saved ranking keeps the same tokens from the first step on, whatever the prompt and the noise."""
    pipe = case.build()
    ranking = ranked(case)
    ranking.save(tmp_path / "ranking.npz")
    loaded = Ranking.load(tmp_path / "ranking.npz")
    assert loaded.fingerprint == ranking.fingerprint
    select = sra.SavedRanking(loaded)
    other = {} if case.name.startswith("qwen") else {"prompt": ["an old bridge"]}
    kept = []
    for config in (sra.SparseRef("mass", 0.25), sra.SparseRef(select, 0.25)):
        with sra.patched(pipe, config) as handle:
            case.call(pipe, references=max(case.references), seed=9, **SHORT, **(other if kept else {}))
            kept.append(handle.record)
    profiled, reused = kept
    assert reused.steps[0].kind == "sparse"
    assert not reused.attention
    assert reused.steps[-1].kept == profiled.steps[-1].kept
    assert reused.scores is not None
    for mine, saved in zip(reused.scores, ranking.scores, strict=True):
        assert torch.equal(mine, saved)


@each_case(lambda case: case.name in in_turn(1, 3))
def test_spearman_between_runs(case: Case) -> None:
    """One a reference, in [-1, 1]; a ranking agrees with itself wholly and with another noise's only in part."""
    one, other = ranked(case), ranked(case, seed=5)
    assert one.spearman(one) == pytest.approx([1.0] * len(one.sizes))
    between = one.spearman(other)
    assert len(between) == max(case.references)
    assert all(-1 <= value < 1 for value in between)
    assert min(between) > 0  # the same pictures, seen by the same model


@each_case(lambda case: case.name in in_turn(2, 3))
def test_other_references_are_refused(case: Case) -> None:
    """Another picture of the same size, unless told to; another size in any case. The pipeline is usable after."""
    pipe = case.build()
    ranking = ranked(case)
    count = max(case.references)
    handle = sra.patch(pipe, sra.SparseRef(sra.SavedRanking(ranking), 0.25))
    with pytest.raises(sra.LayoutError, match=r"must be those that were ranked, of fingerprint \w{12}, got \w{12}"):
        case.call(pipe, references=count, first=5)
    case.call(pipe, references=count, steps=1)
    assert handle.record.steps[0].kind == "sparse"
    sra.patch(pipe, sra.SparseRef(sra.SavedRanking(ranking, require_same_reference=False), 0.25))
    case.call(pipe, references=count, first=5, steps=1)
    if len(case.references) > 1:
        with pytest.raises(sra.LayoutError, match=r"must fit the references, of \(.*got one for \("):
            case.call(pipe, references=1)
        case.call(pipe, references=count, steps=1)


def test_no_ranking_without_one() -> None:
    case = CASES["klein"]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef("mass", 0.5))
    case.call(pipe, steps=1)  # the one step is the profiling step
    with pytest.raises(sra.SparseRefError, match="must have ranked its references"):
        _ = handle.ranking

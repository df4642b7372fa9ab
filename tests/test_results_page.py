"""RESULTS.md is made of the rows: nothing in it is written by hand, and what was not measured is said to be missing."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import measured, results_page, study_plots
from benchmarks.claims import CLAIMS, QUESTIONS, Claim, verdict
from benchmarks.measured import Term, read, text
from benchmarks.results_page import HERE, STUDIES, page
from benchmarks.studies import cases, mass, stability
from benchmarks.studies.__main__ import ATTENTION, NAMES, PICTURES, RUNS

STEPS = 8


def write(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="1", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def runs(folder, studies, models=("dense", "control", "drop"), weights="abc"):
    lines = [
        {"study": study, "model": model, "weights": weights, "steps": str(STEPS), "parameters": "2300000"}
        for study in studies
        for model in models
    ]
    write(folder / "runs.csv", RUNS, lines)


def pictures(folder, study, value):
    """Rows of every case; `value(case, subject, random)` is the metric."""
    random = np.random.default_rng(0)
    rows = []
    for case in PICTURES[study].cases(STEPS):
        for subject in range(4):
            number = text(float(value(case, subject, random)))
            rows.append(
                {
                    "model": case.model, "weights": "abc", "steps": str(STEPS), "task": case.task,
                    "subject": str(subject), "seed": "0", "method": case.method, "keep": text(case.keep),
                    **dict.fromkeys(cases.VALUES, number),
                }
            )  # fmt: skip
    write(folder / f"{study}.csv", [*cases.KEYS, *cases.VALUES], rows)


def attention(folder):
    base = {"model": "dense", "weights": "abc", "steps": str(STEPS)}
    rows = [
        {**base, "task": task, "subject": str(subject), "seed": "0", "step": str(step), "block": block,
         **dict.fromkeys(mass.VALUES, text(0.5 + subject / 10 - step / 100))}
        for task in mass.TASKS for subject in range(3) for step in range(STEPS)
        for block in ("0", "double", "single", "all")
    ]  # fmt: skip
    write(folder / "mass.csv", [*mass.KEYS, *mass.VALUES], rows)
    rows = [
        {**base, "task": "place", "subject": str(subject), "seed": "0", "kind": kind, "a": str(a), "b": str(b),
         **dict.fromkeys(stability.VALUES, text(0.9 + subject / 100))}
        for subject in range(3)
        for kind, a, b in [("prompt", 0, 1), ("seed", 0, 1), ("block", 0, "single"),
                           *(("step", a, b) for a in range(STEPS) for b in range(a + 1, STEPS))]
    ]  # fmt: skip
    write(folder / "stability.csv", [*stability.KEYS, *stability.VALUES], rows)


def test_the_page_is_made_of_the_rows():
    assert (HERE / "RESULTS.md").read_text(encoding="utf-8") == page(), "python -m benchmarks.results_page --write"


def test_the_plots_of_the_rows_are_there():
    for name, (study, _, _) in study_plots.PLOTS.items():
        assert (STUDIES / f"{name}.png").exists() == (read(STUDIES, study) is not None)


def test_without_rows_everything_is_said_to_be_missing(tmp_path):
    made = page(tmp_path)
    # tables of README.md and docs
    elsewhere = {"reading", "reading_work", "rest", "fewer_steps", "isolation", "tuning"}
    here = set(NAMES) - elsewhere
    assert {study for study, _, _ in results_page.SECTIONS} == here
    assert made.count("Not measured: `python -m benchmarks.studies --only") == len(here)
    assert made.count("**not measured**") == len(CLAIMS) + len(QUESTIONS)
    assert "No study was run yet" in made
    assert study_plots.draw(tmp_path) == []


def test_every_claim_is_about_rows_that_a_study_makes():
    for claim in (*CLAIMS, *QUESTIONS):
        for term in claim.terms:
            if claim.study in ATTENTION:
                study = ATTENTION[claim.study]
                assert term.metric in study.values
                assert set(term.where) <= set(study.keys)
                continue
            made = [
                {"model": case.model, "task": case.task, "method": case.method, "keep": case.keep}
                for case in PICTURES[claim.study].cases(STEPS)
            ]
            assert term.metric in cases.VALUES
            assert term.where in made, claim.text


def test_the_interval_decides():
    claim = Claim("", "", "", "methods", (Term(1, "psnr", {"method": "a"}), Term(-1, "psnr", {"method": "b"})))
    assert claim.above == 0
    from sparse_ref_attn.eval.metrics import Interval

    found = [verdict(Interval(0, low, high), 1.0) for low, high in ((1.1, 2.0), (0.0, 0.9), (0.9, 1.1))]
    assert found == ["held", "did not hold", "undecided"]
    assert verdict(None, 0) == "not measured"


@pytest.mark.parametrize(("lead", "wanted"), [(2.0, "held"), (-2.0, "did not hold"), (0.0, "undecided")])
def test_claims_follow_the_rows(tmp_path, lead, wanted):
    """The mass leads random by `lead`; the subjects differ by far more, so that only the paired interval can tell."""
    runs(tmp_path, ["methods"])

    def value(case, subject, random):
        return 20 + 5 * subject + lead * case.method.startswith("ReCAST") + random.normal(0, 0.3)

    pictures(tmp_path, "methods", value)
    claim, made = next(c for c in CLAIMS if c.text == "ranking by cross-image attention beats random"), page(tmp_path)
    assert verdict(claim.interval({"methods": read(tmp_path, "methods")}), claim.above) == wanted
    assert "| ranking by cross-image attention beats random | DINO +0.143 | " in made
    row = next(line for line in made.splitlines() if claim.text in line)
    assert row.endswith(f"**{wanted}** |")


def test_a_page_of_partial_rows(tmp_path):
    """Half of a study, other studies missing, a model that was not given."""
    runs(tmp_path, ["sparse_context"], models=("dense", "drop"))
    pictures(tmp_path, "sparse_context", lambda case, subject, random: 20 + subject + case.keep)
    made = page(tmp_path)
    assert "one reference, drop" in made
    assert "one reference, control" not in made
    claims = {line.split(" | ")[1]: line for line in made.splitlines() if line.startswith("| Sparse Context")}
    assert "not measured" in claims["and less than a model tuned as long without dropping"]
    assert "not measured" not in claims["random dropping hurts the drop-tuned model less than the dense-trained one"]


def test_rows_of_other_weights_do_not_count(tmp_path):
    runs(tmp_path, ["methods"], weights="other")
    pictures(tmp_path, "methods", lambda case, subject, random: 20)
    assert read(tmp_path, "methods") is None


def test_every_section_and_plot_of_a_full_set_of_rows(tmp_path, monkeypatch):
    """Every plot is painted; one is written. How wide an interval is does not matter."""
    monkeypatch.setattr(measured, "RESAMPLES", 99)
    runs(tmp_path, NAMES)
    for study in PICTURES:
        pictures(tmp_path, study, lambda case, subject, random: 20 + subject + case.keep + random.normal(0, 0.1))
    attention(tmp_path)
    made = page(tmp_path)
    assert "benchmarks.studies --only" not in made
    assert "not measured" not in made
    assert "2.3 million parameters" in made
    for name, (study, _, paint) in study_plots.PLOTS.items():
        assert made.count(f"results/studies/{name}.png") == 1
        paint(read(tmp_path, study), figure := Figure())
        assert figure.axes
        assert all(axes.has_data() for axes in figure.axes), name
    monkeypatch.setattr(study_plots, "PLOTS", {"entropy": study_plots.PLOTS["entropy"]})
    drawn = study_plots.draw(tmp_path)
    assert [path.stem for path in drawn] == ["entropy"]
    assert all(path.stat().st_size > 5_000 for path in drawn)


def test_reliability_adds_up_the_parts_of_a_test(tmp_path):
    where = {"date": "2026-11-21", "commit": "abc", "device": "a CPU", "torch": "2", "diffusers": "0.42"}
    shard = "test_configurations.py::test_ten_thousand_random_configurations"
    held = {"resident_start": 2**20, "resident_end": 3 * 2**20, "tensors_start": 7, "tensors_end": 7}
    rows = [
        {"test": f"{shard}[0]", "count": 100, "ran": 60, "detail": "ConfigError 35, patch 40, run 60"},
        {"test": f"{shard}[12]", "count": 100, "ran": 61, "detail": "ConfigError 30, patch 50, steps 50"},
        {"test": "test_growth.py::test_a_thousand_generations[both]", "count": 1002, "ran": "", **held},
    ]
    columns = [*where, "test", "count", "ran", "detail", *held]
    empty = dict.fromkeys(columns, "")
    write(tmp_path / "reliability.csv", columns, [{**empty, **where, **row} for row in rows])
    made = page(tmp_path / "studies")
    added = "ConfigError 65, patch 90, run 60, steps 50"
    assert f"| ten thousand random configurations | 200 | 121 | {added} |  |  |" in made
    assert "| a thousand generations [both] | 1,002 |  |  | 1 to 3 | 7 to 7 |" in made
    assert "- a CPU, torch 2, diffusers 0.42, commit abc" in made


def test_the_performance_tables_are_linked():
    for target in ("../docs/speed.md", "README.md", "results"):
        assert f"({target})" in results_page.PERFORMANCE
        assert (HERE / target).exists()

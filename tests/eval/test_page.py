"""A comparison's page: self-contained, and the same numbers in every form."""

from __future__ import annotations

import base64
import csv
import json
import re
from argparse import Namespace
from pathlib import Path

import pytest

import sparse_ref_attn as sra
from benchmarks.front_page import compared
from sparse_ref_attn.cli import builtin, calling, main
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval import methods as named
from sparse_ref_attn.eval.compare import compare_all
from sparse_ref_attn.eval.embedded import kontext_pipeline
from sparse_ref_attn.eval.method_rows import rows_of
from sparse_ref_attn.eval.metrics import Psnr, Ssim
from tests.eval.drawing import draw_on_page

METHODS = ["downscaled", "ReCAST rising", "edges", "ToMe"]
TINY = ["--size", "tiny", "--steps", "3", "--keep", "50%", "--methods", *METHODS]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the plots of two metrics, one of which is better where it is lower."""
    out = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        draw_on_page(patch, Psnr.name, "LPIPS (alex)")
        assert main(["compare", "--out", str(out), *TINY]) == 0
    return out


def test_page_needs_nothing_but_itself(page: Path) -> None:
    text = (page / "compare.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) >= 1 + len(METHODS)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "<script" not in text
    assert text.count("<svg") == 2 * (text.count("↑</th>") + text.count("↓</th>"))
    assert "random (seeded)" in text
    for name in ("dense", *METHODS):
        assert f"<b>{name}</b>" in text


def test_what_was_asked_comes_first_and_every_picture_stands_beside_the_page(page: Path) -> None:
    text = (page / "compare.html").read_text()
    prompt = json.loads((page / "compare.json").read_text())["about"]["arguments"]["prompt"]
    places = [text.index(part) for part in (f"<blockquote>{prompt}<", ">reference<", ">dense<", f">{METHODS[0]}<")]
    assert places == sorted(places)
    assert 'name="viewport"' in text
    names = {path.stem for path in (page / "pictures").iterdir()}
    fewer = set(json.loads((page / "compare.json").read_text())["rivals"]["runs"])
    assert fewer <= {"1 step", "2 steps"}
    assert names == {"reference", "dense", *METHODS, *fewer, "kept ReCAST rising", "kept edges"}
    inline = re.search(r'<img src="data:image/png;base64,([^"]*)" alt="reference"', text)
    assert base64.b64decode(inline[1]) == (page / "pictures/reference.png").read_bytes()


@pytest.mark.usefixtures("pixels_alone")
def test_a_method_that_reads_everything_is_not_one_that_changes_tokens(tmp_path: Path) -> None:
    """Of "cache" the page said that it changed the tokens."""
    given = ["--size", "tiny", "--steps", "3", "--keep", "50%", "--methods", "cache", "ToMe"]
    assert main(["compare", "--out", str(tmp_path), *given]) == 0
    text = (tmp_path / "compare.html").read_text()
    assert "<p>cache: reads every token.</p>" in text
    assert "<p>ToMe: changes the tokens" in text
    assert "references run in 2 of 3 steps" in text


@pytest.mark.usefixtures("pixels_alone")
def test_the_small_models_right_answer_is_shown(tmp_path: Path) -> None:
    assert main(["compare", "--out", str(tmp_path), "--steps", "2", "--keep", "50%", "--methods", "edges"]) == 0
    text = (tmp_path / "compare.html").read_text()
    assert text.index('alt="reference"') < text.index('alt="answer"') < text.index('alt="dense"')
    assert (tmp_path / "pictures/answer.png").is_file()
    assert compared(tmp_path).width == 1400  # as the documentation shows it: four pictures in a row


def test_every_form_holds_the_same_rows(page: Path) -> None:
    rows = json.loads((page / "compare.json").read_text())["rows"]
    with (page / "compare.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [row["method"] for row in table]
    assert rows[0]["method"] == "dense"
    seconds = [row["seconds"] for row in rows[1:]]
    assert seconds == sorted(seconds, reverse=True)
    kept = {row["method"]: row["tokens_a_step"] for row in rows if row["method"] in ("dense", *METHODS)}
    assert kept == {"dense": 64, "downscaled": 30, "ReCAST rising": 32, "edges": 32, "ToMe": 32}  # 30 is 5 x 6 tokens
    for row, line in zip(rows, table, strict=True):
        assert list(row) == list(line)
        assert all(float(line[k]) == v for k, v in row.items() if isinstance(v, float))
    markdown = (page / "compare.md").read_text().splitlines()
    assert "ewer steps" in markdown[0]
    assert [line.split("|")[1].strip() for line in markdown[4:]] == [row["method"] for row in rows]


@pytest.mark.usefixtures("pixels_alone")
def test_execution_flags_reach_the_methods_that_they_mean_something_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--from-block", "1", "--profile", "in_flight", "--profile-blocks", "1"]
    assert main(["compare", "--out", str(tmp_path), *TINY, *flags]) == 0
    runs = json.loads((tmp_path / "compare.json").read_text())["runs"]
    configs = {name: found["run"]["config"] for name, found in runs.items()}
    assert {name: config["profile"] for name, config in configs.items()} == {
        "ReCAST rising": "in_flight", "edges": "step",
    }  # fmt: skip
    assert all(config["from_block"] == 1 for config in configs.values())
    assert (
        "downscaled, ToMe could not run: a rival changes tokens at the transformer's input" in capsys.readouterr().out
    )


def test_rows_are_the_runs() -> None:
    """At every token a method is dense, bit for bit; what it keeps is in its row."""
    pipe = kontext_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    made = builtin.builtin(Namespace(builtin="tiny", edit=None, prompt="a cup", steps=3), None)
    arguments, steps = made.arguments, made.steps
    refused: dict[str, str] = {}
    configs = {
        "all": sra.SparseRef("grid", 1.0),
        "quarter": sra.SparseRef("grid", 0.25),
        "two weights": sra.SparseRef("grid", 0.25, weights=(1.0, 2.0)),
    }
    results = compare_all(pipe, configs, calling.caller(pipe, arguments, 0), steps=steps, refused=refused)
    assert list(results) == ["all", "quarter"]
    assert "weights must be one a reference" in refused["two weights"]
    rows = rows_of(results, [Psnr(), Ssim()])
    dense, every, quarter = (
        rows[0],
        *(next(row for row in rows if row["method"] == name) for name in configs if name in results),
    )
    assert dense["tokens_a_step"] == every["tokens_a_step"] == 4 * quarter["tokens_a_step"]
    assert every["PSNR (dB)"] == float("inf")
    assert 0 < quarter["PSNR (dB)"] < 100
    assert every["flop_ratio"] == 1 < quarter["flop_ratio"]
    with pytest.raises(ConfigError, match="weights must be one a reference"):
        compare_all(pipe, configs, calling.caller(pipe, arguments, 0), steps=steps)


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.25, 0.05])
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_ramps_have_one_mean(keep: float, steps: int) -> None:
    """Over the steps that drop any, so that only the direction is compared: a dense first step has no budget."""
    from sparse_ref_attn.schedules import Clock

    for rule, first in (("edges", 0), ("ReCAST", 1), ("self-attention", 1)):
        names = [named.method_name(rule, schedule) for schedule in ("flat", "rising", "falling")]
        counts = {
            name: [config.budget.counts(Clock.uniform(i, steps), (100_000,), None)[0] for i in range(first, steps)]
            for name, config in named.methods(keep, names, steps=steps).items()
        }
        flat, rising, falling = counts.values()
        assert sum(rising) == pytest.approx(sum(flat), abs=steps)
        assert sum(falling) == pytest.approx(sum(flat), abs=steps)
        if keep < 1 and len(flat) > 1:
            assert rising[0] < flat[0] < rising[-1]
            assert falling[0] > flat[0] > falling[-1]


def test_a_dense_first_step() -> None:
    """It puts a rule that measures nothing on a par with one that does."""
    from sparse_ref_attn.schedules import Clock

    (name,) = {named.method_name("random", "dense-first")}
    budget = named.methods(0.25, [name])[name].budget
    assert [budget.counts(Clock.uniform(i, 8), (100,), None)[0] for i in range(8)] == [100] + 7 * [25]
    assert named.method_name("self-attention", "dense-first") == "self-attention"


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.25, 0.01])
def test_every_method_keeps_the_same_share(keep: float) -> None:
    from sparse_ref_attn.schedules import Clock

    found = named.methods(keep)
    assert list(found) == list(named.METHODS)
    for name, config in found.items():
        if name in ("cache", "tiles"):  # all tokens, in that share of the steps
            for steps in (101, 12):
                full = named.methods(keep, [name], steps=steps)[name].execute.refresh.steps(steps)
                assert len(full) == max(1, round(keep * steps))
            continue
        counts = [config.budget.counts(Clock.uniform(i, 101), (10_000,), None)[0] for i in range(101)]
        assert sum(counts) / len(counts) == pytest.approx(10_000 * keep, rel=0.01), name


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(ConfigError, match=r"keep must lie in \(0, 1\], got 2"):
        named.methods(2)
    with pytest.raises(ConfigError, match="got magic"):
        named.methods(0.5, ["magic"])
    with pytest.raises(ConfigError, match="must be given the mask of the reference"):
        named.methods(0.5, ["subject mask"])
    assert main(["compare", "--out", "x", "--model", "somewhere"]) == 2

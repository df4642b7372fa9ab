"""What a comparison writes fits one schema, gives away nothing that was not asked for, and is read again whole."""

from __future__ import annotations

import base64
import copy
import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.candidates import DENSE
from sparse_ref_attn.cli import main
from sparse_ref_attn.eval.frontier.figure import figure
from sparse_ref_attn.eval.reports.reading import SharedReport
from sparse_ref_attn.eval.reports.scatter import on_frontier
from sparse_ref_attn.eval.reports.schema import KEYWORDS, broken, check, schema
from sparse_ref_attn.eval.reports.shareable import shareable
from sparse_ref_attn.eval.reports.table import as_csv, as_markdown
from sparse_ref_attn.frontier import read_points
from sparse_ref_attn.vocabulary import OPEN_SCENERY
from tests.eval import report_example
from tests.eval.drawing import compare_pixels, leave_page_undrawn
from tests.pictures import picture
from tests.pipelines import CASES

PROMPT = "a secret cup on Ann's table"
TELLS = frozenset(("$schema", "title", "description", "$defs"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison on a pipeline from a folder, and what was shared of it, with pictures and without."""
    folder = tmp_path_factory.mktemp("private place")
    CASES["kontext"].build().save_pretrained(folder / "my model")
    picture(48, 32).save(folder / "my photo.png")
    words = ["--model", folder / "my model", "--image", folder / "my photo.png", "--prompt", PROMPT]
    words += ["--set", "max_sequence_length=32", "--set", "_auto_resize=false", "--output", "32x32", "--steps", "3"]
    words += ["--keep", "60%", "--methods", "cache", "grid", "--set", 'negative_prompt="a vase"']
    words += ["--set", "true_cfg_scale=2"]
    for name, more in (("numbers", []), ("pictures", ["--share-pictures"])):
        out = ["--out", folder / f"page {name}", "--share", folder / f"{name}.json", *more]
        with pytest.MonkeyPatch.context() as patch:
            (compare_pixels if more else leave_page_undrawn)(patch)
            assert main([str(word) for word in ["compare", *words, *out]]) == 0
    return folder


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(file)), np.float64)


@pytest.fixture
def document(made: Path) -> dict[str, Any]:
    return json.loads((made / "numbers.json").read_text())


def test_what_is_shared_has_the_numbers_of_the_page(made: Path, document: dict[str, Any]) -> None:
    own = json.loads((made / "page numbers/compare.json").read_text())
    assert document["about"].pop("arguments") == {
        "height": 32, "width": 32, "max_area": 1024, "max_sequence_length": 32, "_auto_resize": False,
        "true_cfg_scale": 2, "steps": 3,
    }  # fmt: skip
    assert document.pop("shared") == {"left_out": ["model", "negative_prompt", "prompt"], "pictures": {}}
    assert own["about"].pop("arguments")["prompt"] == PROMPT
    assert own["about"].pop("model") == str(made / "my model")
    assert document["about"].pop("model") is None
    assert document == own


def test_nothing_that_the_user_wrote_or_named_is_given_away(made: Path) -> None:
    text = (made / "numbers.json").read_text()
    for private in ("secret", "Ann", "vase", "my model", "my photo", str(made), made.parent.name, "base64"):
        assert private not in text, private
    assert PROMPT in (made / "page numbers/compare.json").read_text()  # where it would have come from


def test_pictures_and_words_go_along_when_asked_for(made: Path) -> None:
    found = json.loads((made / "pictures.json").read_text())
    assert found["about"]["arguments"]["prompt"] == PROMPT
    assert found["shared"]["left_out"] == ["model"]
    assert str(made) not in json.dumps(found)
    pictures = found["shared"]["pictures"]
    assert set(pictures) == {"reference", "dense", "cache", "grid", *found["rivals"]["runs"]}
    own = {name: pixels((made / f"page pictures/pictures/{name}.png").read_bytes()) for name in pictures}
    for name, text in pictures.items():
        given = pixels(base64.b64decode(text.removeprefix("data:image/jpeg;base64,")))
        away = {other: np.abs(given - seen).mean() if given.shape == seen.shape else 255 for other, seen in own.items()}
        assert min(away, key=away.get) == name
        assert away[name] < 12  # of noise, which is what JPEG keeps worst


def test_a_hub_id_stays_and_a_folder_of_its_shape_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"model": "black-forest-labs/FLUX.1-Kontext-dev", "arguments": {"sigmas": [1.0, 0.5], "ids": ["a"]}}
    found = shareable({"about": about})
    assert found["about"] == about | {"arguments": {"sigmas": [1.0, 0.5]}}
    assert found["shared"]["left_out"] == ["ids"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / about["model"]).mkdir(parents=True)
    assert shareable({"about": about})["about"]["model"] is None
    assert about["model"]  # the original is as it was


def test_a_stranger_sees_what_the_runs_were(made: Path) -> None:
    (report,) = sra.read_shared(made / "numbers.json")
    points = report.points()
    assert {point.method for point in points} == {"cache", "grid", *report.document["rivals"]["runs"]}
    assert [point.seconds for point in points] == sorted((point.seconds for point in points), reverse=True)
    rows = {row["method"]: row for row in report.document["rows"]}
    runs = report.document["runs"]
    for point in points:
        assert point.model == "FluxKontextPipeline"
        assert point.references == 1
        assert (point.kind == "sparse") == (point.method in ("cache", "grid"))
        assert point.steps == 3 if point.kind == "sparse" else point.steps <= 3
        assert point.speedup == pytest.approx(report.dense_seconds / point.seconds)
        assert point.metrics == {name: rows[point.method][name] for name in report.metrics}
    for point in (point for point in points if point.kind == "sparse"):
        config = sra.SparseRef.from_json(json.dumps(runs[point.method]["run"]["config"]))
        assert report.about["methods"][point.method] == config.describe()
    moved = [each["worst"] for each in runs["cache"]["run"]["cache"]["drift"]]
    (stored,) = (point for point in points if point.method == "cache")
    assert stored.drift == max(moved) > 0
    assert report.document["call"] == {
        "output": [32, 32], "text_tokens": 32, "generation_tokens": 64, "reference_tokens": [96], "batch": 1,
    }  # fmt: skip
    assert report.about["references"] == [[48, 32]]


@pytest.mark.usefixtures("pixels_alone")
def test_weights_and_settings_are_told_apart(made: Path, tmp_path: Path) -> None:
    (first,) = sra.read_shared(made / "numbers.json")
    assert main(["compare", "--out", str(tmp_path), "--size", "tiny", "--steps", "2", "--methods", "grid"]) == 0
    (second,) = sra.read_shared(tmp_path)
    one, other = first.about["transformer"], second.about["transformer"]
    assert one["class"] == other["class"] == "FluxTransformer2DModel"
    assert one["weights"] != other["weights"]
    assert one["config"] != other["config"]


def test_a_measurement_given_twice_is_there_once(made: Path) -> None:
    files = [made / "numbers.json", made / "page numbers", made / "pictures.json"]
    assert [report.path.name for report in sra.read_shared(files)] == ["numbers.json", "pictures.json"]


def test_tables_hold_every_run(made: Path) -> None:
    reports = sra.read_shared([made / "numbers.json", made / "pictures.json"])
    rows = list(csv.DictReader(io.StringIO(as_csv(reports))))
    files = [name for each in reports for name in [each.path.name] * (1 + len(each.points()))]
    assert [row["file"] for row in rows] == files
    assert {row["weights"] for row in rows} == {reports[0].about["transformer"]["weights"][:16]}
    for report in reports:
        for point in report.points():
            (row,) = (row for row in rows if (row["file"], row["method"]) == (point.report, point.method))
            assert float(row["speedup"]) == point.speedup
            assert float(row["SSIM"]) == point.metrics["SSIM"]
    lines = as_markdown(reports[:1]).splitlines()
    head = next(line for line in lines if line.startswith("**numbers.json**"))
    assert head.startswith("**numbers.json**: FluxKontextPipeline (float32, weights ")
    seconds = [float(line.split("|")[3]) for line in lines[lines.index(head) + 4 :]]
    assert len(seconds) == 1 + len(reports[0].points())
    assert seconds == sorted(seconds, reverse=True)


def test_a_strangers_words_break_no_table(made: Path, document: dict[str, Any], tmp_path: Path) -> None:
    for row in document["rows"]:
        row["PSNR (dB)"] = None  # none stands on the frontier, which has no words of theirs
    document["rows"][1]["method"] = "a | b\n| c $\\frac{$"
    document["about"]["pipeline"] = "$x^{ | `y`\n# head"
    (tmp_path / "theirs.json").write_text(json.dumps(document))
    reports = sra.read_shared(tmp_path)
    cells = [line.count("|") for line in as_markdown(reports).splitlines()[-2 - len(document["rows"]) :]]
    assert len(set(cells)) == 1
    assert cells[0] > 8
    assert main(["shared", str(tmp_path), "--metric", "ssim", "--out", str(tmp_path / "out")]) == 0
    with PIL.Image.open(tmp_path / "out/shared.png") as shown:
        assert shown.width > 300


def test_equal_pictures_have_no_psnr(made: Path, document: dict[str, Any], tmp_path: Path) -> None:
    for row in document["rows"][1:]:
        row["PSNR (dB)"] = None
    (tmp_path / "theirs.json").write_text(json.dumps(document))
    assert as_markdown(sra.read_shared(tmp_path)).count("| equal |") == len(document["rows"]) - 1
    assert main(["shared", str(tmp_path), "--out", str(tmp_path / "out")]) == 0


def test_a_newer_version_is_refused_in_words(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(json.dumps(document | {"version": 2, "rows": "of another kind"}))
    with pytest.raises(
        sra.ConfigError, match=r"version must be at most 1, got 2 in .*new\.json: it was written by a newer"
    ):
        sra.read_shared(tmp_path / "new.json")


def drift(found: dict[str, Any]) -> list[dict[str, Any]]:
    return found["runs"]["cache"]["run"]["cache"]["drift"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.pop("schema"), "which does not say \"schema\": \"sparse_ref_attn.report\""),
        (lambda found: found.pop("runs"), "it must have 'runs', got 'schema', 'version'"),
        (lambda found: found["about"].pop("device"), "about must have 'device'"),
        (lambda found: found["rows"][1].update(speedup="fast"), "rows[1].speedup must be a number, got 'fast'"),
        (lambda found: found["rows"][1].update(speedup=True), "rows[1].speedup must be a number, got True"),
        (lambda found: found["rows"][1].update(speedup=0), "rows[1].speedup must be above 0, got 0"),
        (lambda found: found["rows"][1].update({"SSIM": [1]}), "rows[1].SSIM must be a number or"),
        (lambda found: found["rows"].clear(), "rows must have at least 1 entries, got 0"),
        (lambda found: found["about"]["arguments"].update(steps=2.5), "about.arguments.steps must be a whole number"),
        (lambda found: found["about"].update(date="today"), "about.date must fit"),
        (lambda found: found["runs"]["grid"].update(dense={}), "runs.grid.dense must have 'seconds', got nothing"),
        (lambda found: drift(found)[0].update(worst="far"), "cache.drift[0].worst must be a number or null, got 'far'"),
        (lambda found: found["shared"]["pictures"].update(dense="http://x"), "shared.pictures.dense must fit"),
        (lambda found: found.update(version=0), "version must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_breaks_the_schema_is_said_with_its_place(
    change: Callable[[Any], Any], words: str, document: dict[str, Any], tmp_path: Path
) -> None:
    change(document)
    (tmp_path / "theirs.json").write_text(json.dumps(document))
    with pytest.raises(sra.ConfigError) as told:
        sra.read_shared(tmp_path / "theirs.json")
    assert words in str(told.value)
    assert "theirs.json" in str(told.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"schema": NaN}', "[" * 100_000, "\x00", '"é"'.encode("latin-1")])
def test_a_file_that_is_no_report(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(sra.ConfigError, match=r"a report must be a .*x\.json"):
        sra.read_shared([tmp_path / "x.json"])


def test_numbers_without_end_are_none(document: dict[str, Any], tmp_path: Path) -> None:
    document["rows"][1]["seconds"] = 123456.5
    (tmp_path / "x.json").write_text(json.dumps(document).replace("123456.5", "1e999"))
    with pytest.raises(sra.ConfigError, match=r"rows\[1\].seconds must be a number, got inf"):
        sra.read_shared(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps(document | {"further": float("nan")}))
    with pytest.raises(sra.ConfigError, match=r"x\.json: NaN is no number of JSON"):
        sra.read_shared(tmp_path / "x.json")


def test_files_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(sra.ConfigError, match="must be given as files, or as folders that hold them"):
        sra.read_shared(tmp_path)
    with pytest.raises(sra.ConfigError, match="must be a readable JSON file"):
        sra.read_shared(tmp_path / "none.json")


def rules(rule: Any) -> Iterator[dict[str, Any]]:
    """Every rule of the schema, wherever it stands."""
    yield rule
    for name in ("properties", "$defs"):
        for each in rule.get(name, {}).values():
            yield from rules(each)
    for each in (*rule.get("anyOf", ()), *(rule[name] for name in ("items", "additionalProperties") if name in rule)):
        yield from rules(each)


def test_no_keyword_of_the_schema_is_passed_over() -> None:
    assert {name for rule in rules(schema()) for name in rule} <= KEYWORDS | TELLS


def spoilt(value: Any, draw: random.Random) -> Any:
    """A copy with one thing of it changed: another type, another number, a field less."""
    value = copy.deepcopy(value)
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return value
        key = draw.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and draw.random() < 0.9:
            at = at[key]
            continue
        if isinstance(at, dict) and draw.random() < 0.3:
            del at[key]
        else:
            at[key] = draw.choice([None, True, -1, 0, 2.5, 3.0, "words", [], {}, [None], {"worst": 1}, [1, 2]])
        return value


def test_the_package_for_schemas_says_the_same(document: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    theirs = jsonschema.Draft202012Validator(schema())
    assert theirs.is_valid(document)
    draw, refused = random.Random(0), 0
    for _ in range(400):
        wrong = spoilt(document, draw)
        ours = list(broken(wrong, schema(), ""))
        assert theirs.is_valid(wrong) == (not ours), ours
        refused += bool(ours)
    assert 100 < refused < 400


def test_the_commands_own_files_are_checked_too(document: dict[str, Any]) -> None:
    """As the writer would notice a field that it no longer writes."""
    del document["call"]["output"]
    with pytest.raises(sra.ConfigError, match="call must have 'output'"):
        check(document, "mine")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--share", "{out}/mine.txt"], "must be a file that ends in .json, got"),
        (["--share", "{out}/none/mine.json"], "must lie in a folder that can be written to, got"),
        (["--share-pictures"], "--share-pictures must come with --share FILE"),
    ],
)
def test_what_cannot_be_shared_is_told_before_anything_runs(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(out=tmp_path) for argument in arguments]
    assert main(["compare", "--out", str(tmp_path / "page"), *given]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_draws_what_is_asked_for(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among a few settings."""
    few = [point for point in read_points() if point.base_steps == 12 and point.setting in (DENSE, "stored-once")]
    monkeypatch.setattr("sparse_ref_attn.cli.sharing.read_points", lambda: few)
    files = [str(made / "numbers.json"), str(made / "pictures.json")]
    assert main(["shared", *files]) == 0
    assert capsys.readouterr().out.count("| dense | ") == 2
    assert not list(tmp_path.iterdir())
    assert main(["shared", *files, "--out", str(tmp_path / "out"), "--metric", "ssim"]) == 0
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"shared.csv", "shared.md", "shared.png", "frontier.png"}
    assert "SSIM over the speed-up" in capsys.readouterr().out
    assert main(["shared", *files, "--metric", "beauty"]) == 2
    assert "the metric must be one of PSNR (dB), SSIM" in capsys.readouterr().err


def test_where_fewer_steps_win_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "theirs.json").write_text(json.dumps(report_example.report()))
    reports = sra.read_shared(tmp_path)
    lines = as_markdown(reports).splitlines()
    assert lines[0] == "**All tokens in fewer steps are nearer to the dense picture than edges, in no more time.**"
    told = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[-5:]]
    assert told == [["dense", "3"], ["edges", "3"], ["TaylorSeer", "3"], ["cache", "3"], ["1 step", "1"]]
    kinds = {point.method: (point.kind, point.steps) for point in reports[0].points()}
    assert kinds == {"cache": ("sparse", 3), "edges": ("sparse", 3), "1 step": ("fewer steps", 1),
                     "TaylorSeer": ("other", 3)}  # fmt: skip
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(as_csv(reports)))}
    assert (rows["1 step"]["kind"], rows["1 step"]["steps"], rows["dense"]["steps"]) == ("fewer steps", "1", "3")


def test_files_without_metrics_have_a_table_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs.json").write_text(json.dumps(report_example.report() | {"metrics": []}))
    assert main(["shared", str(tmp_path / "theirs.json"), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"shared.csv", "shared.md"}


def test_runs_stand_on_the_frontier_where_both_are_known() -> None:
    first, second = report_example.report(), report_example.report()
    first["metrics"] = second["metrics"] = [{"name": "PSNR (dB)", "higher_is_better": True}]
    for row in first["rows"]:
        row["PSNR (dB)"] = {"cache": 31.5, "edges": None}.get(row["method"], 40.0)
    second["about"]["references"] *= 3
    for row in second["rows"]:
        row |= {"PSNR (dB)": 20.0, "flop_ratio": None if row["method"] == "edges" else row["flop_ratio"]}
    reports = [SharedReport(Path("a.json"), first), SharedReport(Path("b.json"), second)]
    assert on_frontier(reports, "PSNR (dB)") == {1: [(2.2, 31.5)], 3: [(2.2, 20.0)]}


def test_what_was_measured_is_drawn_beside_the_settings(tmp_path: Path) -> None:
    """Also where it lies far below them: the panels of a row share their height, and the last one set it."""
    points = [
        replace(point, loss_db=None)  # the row of panels of what is measured is drawn alone
        for point in read_points()
        if point.base_steps == 12 and point.setting in (DENSE, "stored-once") and point.family != OPEN_SCENERY
    ]
    drawn = {}
    for name, measured in (("without", None), ("with", {1: [(2.2, 8.5)]})):
        figure(points, tmp_path / f"{name}.png", measured=measured)
        with PIL.Image.open(tmp_path / f"{name}.png") as image:
            drawn[name] = np.asarray(image.convert("RGB")).reshape(-1, 3)
    green = np.array([0x15, 0x80, 0x3D])
    seen = {name: int((np.abs(pixels - green).max(-1) < 3).sum()) for name, pixels in drawn.items()}
    assert seen["without"] == 0
    assert seen["with"] > 80  # one of 60 pixels in its panel, one in the legend

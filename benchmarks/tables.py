"""Tables of `PAGES`, made from the rows in ``benchmarks/results``.

python -m benchmarks.tables            # prints those of whole pipelines
python -m benchmarks.tables --write    # puts all of them into the pages, between the tables' marks
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

from sparse_ref_attn.eval.aggregate import paired
from sparse_ref_attn.eval.rows import read_rows

from .fewer_steps import fewer_steps
from .fitting import fitting
from .frontier import frontier, scenery
from .host_table import host
from .preset_table import presets
from .readings import TABLES as READINGS
from .rests import TABLES as RESTS
from .results import RESULTS, read
from .trainings import TABLES as TRAININGS

ROOT = RESULTS.parent.parent

__all__ = ["EVALUATIONS", "PAGES", "configurations", "findings", "insert", "learned", "pipeline", "write"]

PAGES = (
    "README.md",
    "benchmarks/README.md",
    "docs/choosing.md",
    "docs/configurations.md",
    "docs/memory.md",
    "docs/quality.md",
    "docs/reference-cache.md",
    "docs/speed.md",
    "docs/training.md",
)

STUDIES = READINGS | RESTS | TRAININGS

UNITS = {"side": "{} px", "batch": "batch {}"}


def pipeline(path: Path) -> str:
    """Markdown of whole-pipeline rows: of each case and method the latest, against the dense run of its process."""
    rows = read(path)
    sizes = [name for name in ("side", "batch") if len({row[name] for row in rows}) > 1]
    latest: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        words = [row["model"], row["references"], *(UNITS[name].format(row[name]) for name in sizes)]
        latest.setdefault(", ".join(words), {})[row["method"]] = row
    lines = [
        "| model, references | method | reference tokens a step | seconds | speed-up | bound | measured / bound |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for call, methods in latest.items():
        for method, row in methods.items():
            seconds, speedup = float(row["seconds_median"]), float(row["speedup"])
            bound = "" if method == "dense" else f"{speedup * seconds / float(row['bound_seconds']):.2f}x"
            ratio = "" if method == "dense" else f"{float(row['measured_over_bound']):.2f}"
            lines.append(
                f"| {call} | {method} | {float(row['kept_mean']):,.0f} | {seconds:.2f} "
                f"| {speedup:.2f}x | {bound} | {ratio} |"
            )
    where: dict[str, list[str]] = {}
    for call, methods in latest.items():
        for row in methods.values():
            cases = where.setdefault(_environment(row), [])
            if call not in cases:
                cases.append(call)
    lines += ["", "Medians; each row against the dense run of its own process."]
    lines += [f"- {'; '.join(cases)}: {environment}" for environment, cases in where.items()]
    return "\n".join(lines)


SUBJECT = "subject PSNR (dB) vs target"
PLACED, ALIGNED = "subject-driven", "aligned"
TRAININGS = {"dense": "trained dense", "control": "and 600 steps more", "drop": "and 600 with dropping"}
EVALUATIONS = {
    "eval": (("dense",), ("0.5", "0.25", "0.15", "0.1", "0.05")),
    "tuned": (tuple(TRAININGS), ("0.25", "0.1")),
}
"""Models and shares of the pages' tables of `learned`, by their marks."""


def learned(path: Path, models: Sequence[str], keeps: Sequence[str]) -> str:
    """Markdown of the small model: PSNR of the subject in subject-driven edits, by training and share kept.

    Of the methods that were run with all of them.
    """
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in read(path):
        if (row["family"], row["metric"], row["against"]) == (PLACED, SUBJECT, ""):
            spread = (float(row["high"]) - float(row["low"])) / 2
            cells.setdefault(row["method"], {})[row["model"], row["keep"]] = f"{float(row['mean']):.1f} ± {spread:.1f}"
    columns = [(model, keep) for model in models for keep in keeps]
    titles = [
        ", ".join([TRAININGS[model]] * (len(models) > 1) + [f"{100 * float(keep):.0f} %"]) for model, keep in columns
    ]
    lines = [f"| kept by | {' | '.join(titles)} |", "|---|" + "--:|" * len(columns)]
    dense = cells.pop("dense")
    lines.append("| all tokens | " + " | ".join(dense[model, "1"] for model, _ in columns) + " |")
    whole = [method for method, own in cells.items() if all(column in own for column in columns)]
    for method in sorted(whole, key=lambda name: -float(cells[name]["dense", "0.25"].split()[0])):
        lines.append(f"| {method} | " + " | ".join(cells[method][column] for column in columns) + " |")
    return "\n".join(lines)


Run = tuple[str, str, str]
ALL: Run = ("dense", "dense", "1.0")
FINDINGS = (
    *((PLACED, ("dense", "ReCAST flat", keep), ALL) for keep in ("0.5", "0.25", "0.1")),
    (PLACED, ("dense", "ReCAST flat", "0.25"), ("dense", "random", "0.25")),
    *(
        (PLACED, ("dense", "ReCAST flat", "0.15"), ("dense", rule, "0.25"))
        for rule in ("downscaled", "edges", "saliency")
    ),
    (PLACED, ("dense", "ReCAST flat", "0.05"), ("dense", "saliency", "0.15")),
    *((PLACED, ("dense", "mass x values", keep), ("dense", "ReCAST flat", keep)) for keep in ("0.25", "0.1")),
    (ALIGNED, ("dense", "ReCAST flat", "0.5"), ("dense", "random", "0.5")),
    (ALIGNED, ("dense", "saliency", "0.25"), ("dense", "ReCAST flat", "0.25")),
    *((ALIGNED, ("dense", rule, "0.25"), ALL) for rule in ("saliency", "subject mask")),
    *((PLACED, ("drop", rule, "0.25"), ("dense", rule, "0.25")) for rule in ("random", "ReCAST flat")),
    (PLACED, ("drop", "ReCAST flat", "0.25"), ("drop", "random", "0.25")),
    *((family, (model, "dense", "1.0"), ALL) for family in (PLACED, ALIGNED) for model in ("drop", "control")),
    *((PLACED, ("control", rule, "0.25"), ("dense", rule, "0.25")) for rule in ("random", "ReCAST flat")),
)
"""Paired differences of the page about quality: the kind of edit, and two of (model, method, share)."""

READ = {"cache": "all read", "tiles": "an eighth read per tile"}
FINDINGS_STORED = tuple(
    (family, ("dense", rule, keep), ALL)
    for family in (PLACED, ALIGNED)
    for rule in READ
    for keep in ("0.5", "0.25", "0.1")
)
"""The same of the page about stored references; their share is that of the steps in which the references run."""

FINDINGS_LEARNED = tuple(
    (family, ("dense", "learned", keep), ("dense", rule, other))
    for family in (PLACED, ALIGNED)
    for keep, rule, other in (
        *((keep, rule, keep) for keep in ("0.25", "0.1") for rule in ("saliency", "edges", "grid", "ReCAST flat")),
        ("0.25", "ReCAST flat", "0.15"),
    )
)
"""The learned selector against rules that cost nothing, and against ReCAST at its share and at as many tokens used."""
FOUND = {"findings": FINDINGS, "findings_stored": FINDINGS_STORED, "findings_learned": FINDINGS_LEARNED}


@cache
def _evaluated(folder: Path) -> tuple[int, dict[Run, list[float]], dict[tuple[str, ...], list[dict[str, str]]]]:
    """The steps of an evaluation, the shares that each run used, and the rows of each of its cells."""
    header, rows = read_rows(folder)
    used: dict[Run, list[float]] = {}
    cells: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row[SUBJECT]:
            model, family, method, keep = (row[name] for name in ("model", "family", "method", "keep"))
            used.setdefault((model, method, keep), []).append(float(row["share"]))
            cells.setdefault((model, family, method, keep), []).append(row)
    return header["settings"]["steps"], used, cells


def findings(folder: Path, of: Sequence[tuple[str, Run, Run]] = FINDINGS) -> str:
    """Markdown of `of`, from the rows of an evaluation."""
    steps, used, cells = _evaluated(folder)

    def words(run: Run) -> str:
        _, method, keep = run
        if method in READ:
            return f"references run in {max(1, round(float(keep) * steps))} of {steps} steps, {READ[method]}"
        share = fmean(used[run])
        more = f" ({share:.0%} used)" if share > float(keep) + 0.01 else ""
        return "all tokens" if method == "dense" else f"{method.removesuffix(' flat')} {float(keep):.0%}{more}"

    lines = ["| edits | weights | compared | dB |", "|---|---|---|--:|"]
    for edits, run, other in of:
        own, base = ((model, edits, method, keep) for model, method, keep in (run, other))
        found = paired([*cells.get(own, []), *cells.get(base, [])], SUBJECT, own, base)
        weights, compared = (
            one if one == two else f"{one} - {two}" for one, two in ((run[0], other[0]), (words(run), words(other)))
        )
        mean, low, high = (f"{value:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0") for value in found)
        lines.append(f"| {edits} | {weights} | {compared} | {mean} [{low}, {high}] |")
    return "\n".join(lines)


def configurations(path: Path, card: str) -> str:
    """Markdown of what the compiler made of one card's configurations."""
    rows = [row for row in read(path) if row["card"] == card]
    hopper = card == "sm_90"
    fences, rule = (" fences / HGMMA |", "--:|") if hopper else ("", "")
    lines = [
        f"| kernel | C | configuration | registers | stack | shared, KiB | programs | matrix steps |{fences} copies |",
        f"|---|--:|---|--:|--:|--:|--:|---|{rule}--:|",
    ]
    for row in rows:
        cells = [row["kernel"], row["channels"], row["config"], row["registers"], row["stack"]]
        cells += [f"{int(row['shared']) / 1024:.0f}", row["programs"], row["steps"].replace(" ", ", ")]
        cells += [f"{row['fences']} / {row['matrix']}"] if hopper else []
        lines.append(f"| {' | '.join([*cells, row['copies']])} |")
    return "\n".join([*lines, "", f"Triton {rows[0]['triton']}, its ptxas."])


def _environment(row: dict[str, str]) -> str:
    return (
        f"{row['device']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}, diffusers "
        f"{row['diffusers']}, {row['date']}, commit {row['commit']}"
    )


def insert(text: str) -> str:
    """`text` with every ``<!-- table:NAME -->`` block filled from ``results/NAME.csv``, of ``configurations_CARD``
    from ``results/configurations.csv``, from ``results/eval`` and ``results/studies``, or from `estimate`."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name in FOUND:
            made = findings(RESULTS / "eval", FOUND[name])
        elif name == "frontier":
            made = frontier()
        elif name == "scenery":
            made = scenery()
        elif name == "presets":
            made = presets()
        elif name == "fewer_steps":
            made = fewer_steps(RESULTS / "studies")
        elif name == "host_cpu":
            made = host(RESULTS / "host_cpu.csv")
        elif name == "fitting":
            made = fitting()
        elif name.startswith("configurations_"):
            made = configurations(RESULTS / "configurations.csv", name.removeprefix("configurations_"))
        elif name in STUDIES:
            made = STUDIES[name](RESULTS / "studies")
        elif name in EVALUATIONS:
            made = learned(RESULTS / "eval/summary.csv", *EVALUATIONS[name])
        else:
            made = pipeline(RESULTS / f"{name}.csv")
        return f"<!-- table:{name} -->\n{made}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- /table -->", fill, text, flags=re.DOTALL)


def write(page: str) -> None:
    """Fill the tables of a page, a path from the repository's root."""
    path = ROOT / page
    path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        for page in PAGES:
            write(page)
    else:
        for csv_path in sorted(RESULTS.glob("pipeline_*.csv")):
            print(f"{csv_path.stem}\n\n{pipeline(csv_path)}\n")

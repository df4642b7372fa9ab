"""Tables of `PAGES`, made from the rows in ``benchmarks/results``.

python -m benchmarks.tables            # prints those of whole pipelines
python -m benchmarks.tables --write    # puts all of them into the pages, between the tables' marks
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .results import RESULTS, read

ROOT = RESULTS.parent.parent

__all__ = ["EVALUATIONS", "PAGES", "insert", "learned", "pipeline"]

PAGES = ("README.md", "benchmarks/README.md")

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


TRAININGS = {"dense": "trained dense", "control": "and 600 steps more", "drop": "and 600 with dropping"}
EVALUATIONS = {
    "eval": (("dense",), ("0.5", "0.25", "0.15", "0.1", "0.05")),
    "tuned": (tuple(TRAININGS), ("0.25", "0.1")),
}
"""Models and shares of the README's tables of `learned`, by their marks."""


def learned(path: Path, models: Sequence[str], keeps: Sequence[str]) -> str:
    """Markdown of the small model: PSNR of the subject in subject-driven edits, by training and share kept."""
    metric = "subject PSNR (dB) vs target"
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in read(path):
        if (row["family"], row["metric"], row["against"]) == ("subject-driven", metric, ""):
            spread = (float(row["high"]) - float(row["low"])) / 2
            cells.setdefault(row["method"], {})[row["model"], row["keep"]] = f"{float(row['mean']):.1f} ± {spread:.1f}"
    columns = [(model, keep) for model in models for keep in keeps]
    titles = [
        ", ".join([TRAININGS[model]] * (len(models) > 1) + [f"{100 * float(keep):.0f} %"]) for model, keep in columns
    ]
    lines = [f"| kept by | {' | '.join(titles)} |", "|---|" + "--:|" * len(columns)]
    dense = cells.pop("dense")
    lines.append("| all tokens | " + " | ".join(dense[model, "1"] for model, _ in columns) + " |")
    for method in sorted(cells, key=lambda name: -float(cells[name]["dense", "0.25"].split()[0])):
        lines.append(f"| {method} | " + " | ".join(cells[method][column] for column in columns) + " |")
    return "\n".join(lines)


def _environment(row: dict[str, str]) -> str:
    return (
        f"{row['device']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}, diffusers "
        f"{row['diffusers']}, {row['date']}, commit {row['commit']}"
    )


def insert(text: str) -> str:
    """`text` with every ``<!-- table:NAME -->`` block filled from ``results/NAME.csv`` or ``results/eval``."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name in EVALUATIONS:
            made = learned(RESULTS / "eval/summary.csv", *EVALUATIONS[name])
        else:
            made = pipeline(RESULTS / f"{name}.csv")
        return f"<!-- table:{name} -->\n{made}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- /table -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        for page in PAGES:
            path = ROOT / page
            path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for csv_path in sorted(RESULTS.glob("pipeline_*.csv")):
            print(f"{csv_path.stem}\n\n{pipeline(csv_path)}\n")

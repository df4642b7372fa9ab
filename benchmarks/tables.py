"""The README's tables, made from the rows in ``benchmarks/results``.

python -m benchmarks.tables            # prints them
python -m benchmarks.tables --write    # puts them into README.md, between the table's marks
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

__all__ = ["insert", "pipeline"]


def pipeline(path: Path) -> str:
    """Markdown of whole-pipeline rows: of each case and method the latest, against the dense run of its process."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    latest: dict[tuple[str, int], dict[str, dict[str, str]]] = {}
    for row in rows:
        latest.setdefault((row["model"], int(row["references"])), {})[row["method"]] = row
    lines = [
        "| model, references | method | reference tokens a step | seconds | speed-up | bound | measured / bound |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for (model, references), methods in latest.items():
        for method, row in methods.items():
            seconds, speedup = float(row["seconds_median"]), float(row["speedup"])
            bound = "" if method == "dense" else f"{speedup * seconds / float(row['bound_seconds']):.2f}x"
            ratio = "" if method == "dense" else f"{float(row['measured_over_bound']):.2f}"
            lines.append(
                f"| {model}, {references} | {method} | {float(row['kept_mean']):,.0f} | {seconds:.2f} "
                f"| {speedup:.2f}x | {bound} | {ratio} |"
            )
    where: dict[str, list[str]] = {}
    for (model, references), methods in latest.items():
        for row in methods.values():
            cases = where.setdefault(_environment(row), [])
            if (case := f"{model}, {references}") not in cases:
                cases.append(case)
    lines += ["", "Medians; each row against the dense run of its own process."]
    lines += [f"- {'; '.join(cases)}: {environment}" for environment, cases in where.items()]
    return "\n".join(lines)


def _environment(row: dict[str, str]) -> str:
    return (
        f"{row['device']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}, diffusers "
        f"{row['diffusers']}, {row['date']}, commit {row['commit']}"
    )


def insert(text: str) -> str:
    """`text` with every ``<!-- table:NAME -->`` block filled from ``results/NAME.csv``."""

    def fill(match: re.Match[str]) -> str:
        path = RESULTS / f"{match[1]}.csv"
        return f"<!-- table:{match[1]} -->\n{pipeline(path)}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- /table -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    if "--write" in sys.argv[1:]:
        readme.write_text(insert(readme.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for csv_path in sorted(RESULTS.glob("pipeline_*.csv")):
            print(f"{csv_path.stem}\n\n{pipeline(csv_path)}\n")

"""The table of `results/reliability.csv`, the rows that ``python -m tests.reliability`` writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["reliability"]

Row = dict[str, str]
HEADER = """What the long tests of `tests/reliability` counted ([how they run](../CONTRIBUTING.md)). Every row passed:
no foreign exception, nothing left on a pipeline, no wrong picture; a test that fails writes no row. What did not run to
its end was refused in the library's own words, with the pipeline as it was, or broken off on purpose.

| what | how many | ran to their end | detail | resident MB | tensors alive |
|---|--:|--:|---|--:|--:|"""


def reliability(rows: Sequence[Row]) -> str:
    """Markdown with a line a test, the parts of one that ran in parts added up, and where the rows come from."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"\[\d+\]$", "", row["test"]), []).append(row)
    table = ["| " + " | ".join(_line(name, group)) + " |" for name, group in groups.items()]
    where = {f"{r['device']}, torch {r['torch']}, diffusers {r['diffusers']}, commit {r['commit']}": 0 for r in rows}
    return "\n".join([HEADER, *table, "", *(f"- {each}" for each in where)])


def _line(name: str, rows: Sequence[Row]) -> list[str]:
    total = {key: sum(int(row[key]) for row in rows if row[key]) for key in ("count", "ran")}
    name = name.partition("::test_")[2].replace("_", " ").replace("[", " [")
    detail = rows[0]["detail"] if len(rows) == 1 else _added([row["detail"] for row in rows])
    held = ["", ""]
    if rows[0]["resident_end"]:
        first, last = (int(rows[0][f"resident_{end}"]) / 2**20 for end in ("start", "end"))
        held[0] = f"{first:.0f} to {last:.0f}"
    if rows[0]["tensors_end"]:
        held[1] = f"{rows[0]['tensors_start']} to {rows[0]['tensors_end']}"
    return [name, f"{total['count']:,}", f"{total['ran']:,}" if total["ran"] else "", detail, *held]


def _added(details: Sequence[str]) -> str:
    """Details of the form "name count, name count" added up."""
    found: Counter[str] = Counter()
    for detail in details:
        for part in filter(None, detail.split(", ")):
            name, _, count = part.rpartition(" ")
            found[name] += int(count)
    return ", ".join(f"{name} {count:,}" for name, count in sorted(found.items()))

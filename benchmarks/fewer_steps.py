"""The table of the study `fewer_steps`: quality over the number of dense steps, and whether seeds differ.

python -m benchmarks.fewer_steps [FOLDER]    # prints it, for all weights that have rows
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

from sparse_ref_attn.eval.aggregate import Values, combined, interval
from sparse_ref_attn.eval.rows import Rows
from sparse_ref_attn.toy.words import OPEN_TASKS

from .studies.fewer_steps import ALIGNED, KEYS, STEPS, VALUES

__all__ = ["agreement", "fewer_steps"]

STUDIES = Path(__file__).resolve().parent / "results" / "studies"
FAMILIES = {"place": ("place",), "pair": ("pair",), "aligned": ALIGNED, "open scenery": tuple(OPEN_TASKS)}
MEASURED = {"subject_psnr": "subject", "psnr": "picture", "scenery_psnr": "scenery"}

Row = dict[str, str]


def fewer_steps(folder: Path = STUDIES) -> str:
    """A table for each set of weights: dB with the most steps, and what fewer lose, with 95 % intervals.

    Raises
    ------
    ValueError
        If there are no rows.
    """
    rows = Rows(folder / "fewer_steps.csv", (*KEYS, *VALUES), keys=KEYS).read()
    if not rows:
        raise ValueError(f"{folder} must hold fewer_steps.csv with rows, got none")
    return "\n\n".join(_table(weights, rows) for weights in dict.fromkeys(row["weights"] for row in rows))


def _table(weights: str, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["weights"] == weights]
    lines = []
    for family, tasks in FAMILIES.items():
        here = [row for row in own if row["task"] in tasks]
        for metric, name in MEASURED.items():
            values = {steps: _values(here, steps, metric) for steps in STEPS}
            if values[STEPS[0]]:
                lines.append([family, name, *_cells(values)])
        if any(row["kind"] for row in here):
            lines += [_contrasts(family, here), *_agreements(family, here)]
    pictures = len({(row["subject"], row["seed"]) for row in own})
    header = ["", "dB of the", f"{STEPS[0]} steps", *(f"{steps}" for steps in STEPS[1:])]
    ruled = [header, ["---", "---", *("--:" for _ in STEPS)], *lines]
    return f"Weights {weights}, {pictures} subjects and seeds\n\n" + "\n".join(f"| {' | '.join(r)} |" for r in ruled)


def _values(rows: Sequence[Row], steps: int, metric: str) -> Values:
    return {
        (f"{row['task']}/{row['subject']}", row["seed"]): float(row[metric])
        for row in rows
        if row["steps"] == str(steps) and row[metric]
    }


def _cells(values: dict[int, Values]) -> list[str]:
    most = values[STEPS[0]]
    cells = [f"{sum(most.values()) / len(most):.1f}"]
    for steps in STEPS[1:]:
        (mean, low, high), _ = interval(combined([(1.0, values[steps]), (-1.0, most)]))
        cells.append(f"{mean:+.2f}" + (f" ({low:+.2f} to {high:+.2f})" if low == low else ""))
    return cells


def _contrasts(family: str, rows: Sequence[Row]) -> list[str]:
    own = [fmean(float(row["contrast"]) for row in rows if row["steps"] == str(steps)) for steps in STEPS]
    task = fmean(float(row["task_contrast"]) for row in rows)
    return [family, f"contrast, in the task {task:.3f}", *(f"{mean:.3f}" for mean in own)]


def _agreements(family: str, rows: Sequence[Row]) -> list[list[str]]:
    names = {"kind": ("kind",), "colours": ("first", "second")}
    found = []
    for name, columns in names.items():
        shares = [agreement([row for row in rows if row["steps"] == str(steps)], columns) for steps in STEPS]
        if all(share is not None for share in shares):
            found.append([family, f"same {name} from two seeds", *(f"{100 * (share or 0):.0f} %" for share in shares)])
    return found


def agreement(rows: Sequence[Row], columns: Sequence[str]) -> float | None:
    """How often two seeds of one question have the same values, in whatever order; None where there is one seed.

    What the task draws agrees in its kind one time in four, and in its two colours one time in 46.

    Examples
    --------
    >>> rows = [{"task": "open", "subject": "0", "kind": kind} for kind in ("dots", "rings", "dots")]
    >>> round(agreement(rows, ["kind"]), 3)
    0.333
    """
    drawn: dict[tuple[str, str], list[list[str]]] = {}
    for row in rows:
        drawn.setdefault((row["task"], row["subject"]), []).append(sorted(row[column] for column in columns))
    same = [one == other for values in drawn.values() for one, other in combinations(values, 2)]
    return sum(same) / len(same) if same else None


if __name__ == "__main__":
    print(fewer_steps(*(Path(argument) for argument in sys.argv[1:2])))

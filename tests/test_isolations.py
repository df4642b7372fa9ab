"""The table of the study `isolation` holds each way against references that run in every step."""

from __future__ import annotations

import pytest

from benchmarks.isolations import BASE, LINES, isolations
from benchmarks.studies import cases, isolation
from benchmarks.studies.study import DIGITS
from sparse_ref_attn.eval.rows import Rows

GAINS = {"dense": -1.0, "isolated": 0.25, "control": 0.5}


def test_each_way_is_compared_at_its_own_number_of_steps(tmp_path):
    rows = Rows(tmp_path / "isolation.csv", (*cases.KEYS, *cases.VALUES), keys=cases.KEYS, digits=DIGITS)
    for steps in (12, 4):
        for case in isolation.cases(steps):
            for subject in range(6):
                base = (case.model, case.method) == (BASE["model"], BASE["method"])
                key = {"model": case.model, "weights": case.model, "steps": steps, "task": case.asked(subject)}
                key |= {"subject": subject, "seed": 0, "method": case.method, "keep": case.keep}
                value = steps + subject + (0.0 if base else GAINS[case.model])
                rows.add([key | dict.fromkeys(cases.VALUES, value)])
    lines = isolations(tmp_path).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 4"] * (1 + len(LINES)) + ["| 12"] * (1 + len(LINES))
    assert lines[0].endswith("| dense | run in every step | 6.5 dB | 6.5 dB | 6.5 dB |")
    for (model, method), line in zip(LINES, lines[1:], strict=False):
        cell = f"{GAINS[model]:+.2f} [{GAINS[model]:+.2f}, {GAINS[model]:+.2f}]"
        assert line == f"| 4 | {model} | {method} | {cell} | {cell} | {cell} |"


def test_without_rows_there_is_no_table(tmp_path):
    with pytest.raises(ValueError, match=r"must hold isolation\.csv with rows"):
        isolations(tmp_path)

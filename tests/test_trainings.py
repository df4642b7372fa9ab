"""Tables of the studies `isolation` and `tuning` hold each line against the one that its group begins with."""

from __future__ import annotations

import pytest

from benchmarks.studies import cases, isolation, tuning
from benchmarks.studies.study import DIGITS
from benchmarks.trainings import GROUPS, TABLES
from sparse_ref_attn.eval.rows import Rows

GAINS = {"dense": -1.0, "isolated": 0.25, "alongside": 0.5, "control": 0.5, "drop": -2.0}
STUDIES = {"isolation": isolation, "tuning": tuning}


def gain(groups, model, method) -> float:
    """Over the weights that ship, in the ways that groups begin with."""
    return 0.0 if model == "dense" and (model, method) in groups else GAINS.get(model, 0.75)


@pytest.mark.parametrize("study", STUDIES)
def test_each_line_is_compared_at_its_own_number_of_steps(study, tmp_path):
    of, groups = STUDIES[study], GROUPS[study]
    rows = Rows(tmp_path / f"{study}.csv", (*cases.KEYS, *cases.VALUES), keys=cases.KEYS, digits=DIGITS)
    for steps in (12, 4):
        for case in of.cases(steps):
            for subject in range(6):
                key = {"model": case.model, "weights": case.model, "steps": steps, "task": case.asked(subject)}
                key |= {"subject": subject, "seed": 0, "method": case.method, "keep": case.keep}
                value = steps + subject + 10 * case.keep + gain(groups, case.model, case.method)
                rows.add([key | dict.fromkeys(cases.VALUES, value)])
    lines = TABLES[study](tmp_path).splitlines()[2:]
    keeps = {case.method: case.keep for case in of.cases(4)}
    for steps in (4, 12):
        for base, others in groups.items():
            mean = f"{steps + 2.5 + 10 * keeps[base[1]] + gain(groups, *base):.1f} dB"
            assert lines.pop(0) == f"| {steps} | {base[0]} | {base[1]} | {mean} | {mean} | {mean} |"
            for model, method in others:
                more = gain(groups, model, method) - gain(groups, *base)
                cell = f"{more:+.2f} [{more:+.2f}, {more:+.2f}]"
                assert lines.pop(0) == f"| {steps} | {model} | {method} | {cell} | {cell} | {cell} |"
    assert not lines


@pytest.mark.parametrize("study", STUDIES)
def test_without_rows_there_is_no_table(study, tmp_path):
    with pytest.raises(ValueError, match=rf"must hold {study}\.csv with rows"):
        TABLES[study](tmp_path)

"""The evaluation that is published is what its rows say."""

import csv
from collections import defaultdict
from statistics import fmean

import pytest

from benchmarks.results import RESULTS
from sparse_ref_attn.eval.rows import read_rows


def test_the_published_means_are_those_of_the_rows():
    folder = RESULTS / "eval"
    about, rows = read_rows(folder)
    assert len({tuple(row[name] for name in ("model", "example", "seed", "method", "keep")) for row in rows}) == len(
        rows
    )
    cells = defaultdict(list)
    for row in rows:
        for metric in about["settings"]["columns"]:
            if row[metric] not in ("", "inf"):
                cells[row["model"], row["family"], row["method"], float(row["keep"]), metric].append(float(row[metric]))
    with (folder / "summary.csv").open(encoding="utf-8") as file:
        means = [mean for mean in csv.DictReader(file) if not mean["against"]]
    assert len(means) == sum(1 for key in cells if key[-1] != "share")
    for mean in means:
        found = cells[mean["model"], mean["family"], mean["method"], float(mean["keep"]), mean["metric"]]
        assert float(mean["mean"]) == pytest.approx(fmean(found), rel=5e-6)
        assert int(mean["n"]) == len(found)
        assert float(mean["low"]) < float(mean["mean"]) < float(mean["high"])

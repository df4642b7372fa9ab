"""Means, paired differences and intervals against hand calculations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval.aggregate import Mean, aggregate, markdown, paired


def row(model: str, example: str, seed: int, method: str, keep: float, x: object) -> dict[str, str]:
    return {"model": model, "family": "f", "example": example, "seed": str(seed), "method": method,
            "keep": repr(keep), "share": repr(keep), "x": str(x)}  # fmt: skip


def one(means: list[Mean], **want: object) -> Mean:
    (found,) = (mean for mean in means if all(getattr(mean, name) == value for name, value in want.items()))
    return found


def test_differences_are_of_the_same_example_and_seed() -> None:
    """Where the examples differ far more than the methods, only pairing can tell."""
    rng = np.random.default_rng(0)
    rows = []
    for example in range(30):
        level = rng.normal(20, 10)
        for seed in range(2):
            noise = rng.normal(0, 1)
            rows.append(row("m", f"e{example}", seed, "random", 0.25, level + noise))
            rows.append(row("m", f"e{example}", seed, "edges", 0.25, level + noise + 0.5 + rng.normal(0, 0.1)))
    rows = [r for r in rows if (r["example"], r["seed"], r["method"]) != ("e3", "1", "random")]
    means = aggregate(rows, ["x"])
    mean = one(means, method="edges", against="")
    difference = one(means, method="edges", against="random")
    assert mean.high - mean.low > 3
    assert (difference.n, difference.examples) == (59, 30)
    assert 0.4 < difference.low < 0.5 < difference.high < 0.6
    cells = [("m", "f", method, "0.25") for method in ("edges", "random")]
    assert paired(rows, "x", *cells) == (difference.mean, difference.low, difference.high)
    with pytest.raises(ConfigError, match="pictures in common"):
        paired(rows, "x", cells[0], ("m", "f", "edges", "0.5"))
    assert difference.mean == pytest.approx(0.5, abs=0.05)


def test_every_baseline_and_model() -> None:
    rows = []
    for model, plus in (("a", 0), ("b", 10)):
        for example in ("1", "2"):
            rows.append(row(model, example, 0, "dense", 1.0, 9 + plus))
            for keep in (0.5, 0.25):
                rows += [row(model, example, 0, m, keep, v + plus + keep)
                         for m, v in (("random", 1), ("ReCAST flat", 3), ("grid", 2))]  # fmt: skip
    means = aggregate(rows, ["x"])
    assert one(means, model="a", method="grid", keep=0.5, against="dense").mean == 2.5 - 9
    assert one(means, model="a", method="grid", keep=0.5, against="random").mean == 1
    assert one(means, model="b", method="grid", keep=0.25, against="ReCAST flat").mean == -1
    assert one(means, model="b", method="grid", keep=0.25, against="model a").mean == 10
    assert one(means, model="b", method="dense", against="model a").mean == 10
    assert not [mean for mean in means if mean.against == mean.method]
    assert "| a | f | grid |  | 2.5 ± 0 | 2.25 ± 0 |" in markdown(means, "x")


def test_a_schedule_is_compared_with_its_flat_one() -> None:
    values = {"edges": 1, "edges rising": 3, "ReCAST flat": 5, "ReCAST falling": 4}
    rows = [row("m", e, 0, method, 0.5, v) for e in ("1", "2") for method, v in values.items()]
    means = aggregate(rows, ["x"], baselines=())
    assert {(m.method, m.against): m.mean for m in means if m.against} == {
        ("edges rising", "edges"): 2, ("ReCAST falling", "ReCAST flat"): -1,
    }  # fmt: skip


def test_infinite_and_missing_values_are_left_out() -> None:
    rows = [row("m", str(i), 0, "grid", 0.5, value) for i, value in enumerate((1.0, 3.0, math.inf, ""))]
    (mean,) = aggregate(rows, ["x"])
    assert (mean.n, mean.mean) == (2, 2.0)
    (alone,) = aggregate(rows[:1], ["x"])
    assert alone.mean == 1.0
    assert math.isnan(alone.low)
    with pytest.raises(ConfigError, match="must have rows, got none"):
        aggregate([], ["x"])

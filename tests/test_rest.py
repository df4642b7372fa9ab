"""What stands for unread tokens in the study `rest` is what the library reads, where it has it, and counts them all."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from benchmarks.rests import rests
from benchmarks.studies import cases, rest
from benchmarks.studies.generator import Generator
from benchmarks.studies.points import WAYS, Seen
from benchmarks.studies.questions import Question
from benchmarks.studies.rest import PointsRun
from benchmarks.studies.stored import Reading, stored
from benchmarks.studies.study import DIGITS
from sparse_ref_attn.eval.models import EvalModel
from sparse_ref_attn.eval.rows import Rows
from sparse_ref_attn.toy.pipeline import TRAINED

AT = (0, 2)
READING = Reading(AT, "tile", 1 / 8)


@pytest.fixture(scope="module")
def generator():
    with torch.no_grad():
        yield Generator(EvalModel("dense", TRAINED, steps=3))


@cache
def picture(generator, way):
    run = PointsRun(generator, READING, WAYS[way])
    with stored(generator.pipe.transformer, generator.adapter, READING, run):
        return generator.picture(Question("place", 0), 0)


@pytest.mark.parametrize(("way", "named"), [("means 4x4", "means"), ("means 4x4 by attention", "weighted")])
def test_the_ways_that_the_library_has_are_its_own(generator, way, named):
    cache = sra.Cache(per="tile", rest=named, refresh=sra.At(AT))
    with sra.patched(generator.pipe, sra.SparseRef(sra.AttentionMass("all"), 1 / 8, execute=cache)):
        wanted = generator.picture(Question("place", 0), 0)
    others = {"means 4x4", "means 4x4 by attention"} - {way}
    assert np.abs(picture(generator, way) - wanted).max() < 1e-4 < np.abs(picture(generator, *others) - wanted).max()


def seen(random):
    """Two references of 8 x 8 and 4 x 6 tokens, of which two groups read some."""
    grids = ((8, 8), (4, 6))
    keys, values = (torch.randn(88, 2, 8, generator=random) for _ in range(2))
    read = torch.rand(3, 88, generator=random) < 0.2
    queries, groups = torch.randn(5, 2, 8, generator=random), torch.tensor([0, 1, 1, 2, 2])
    lse = torch.full((2, 5), 4.0)
    turn = lambda moved: (torch.ones(len(moved), 8), torch.zeros(len(moved), 8))  # noqa: E731
    return Seen(keys, values, read, torch.rand(3, 88, generator=random), queries, lse, groups, grids, turn)


@pytest.mark.parametrize("way", [name for name in WAYS if "fitted" not in name])
def test_points_stand_for_every_token_that_is_not_read(way):
    given = seen(torch.Generator().manual_seed(0))
    points = WAYS[way].make(given)
    stands = points.logs.exp().sum(-1)
    torch.testing.assert_close(stands, (~given.read).sum(1).float()[:, None].expand_as(stands))
    weights = torch.cat([torch.zeros(2, 5, 0), points.scores(given.queries, given.groups, 0.3)], -1).softmax(-1)
    assert points.read(weights, given.queries, 0.3).shape == (5, 2, 8)


def test_second_order_is_exact_for_scores_that_are_nearly_alike():
    """log of the mean of exp(s) is the mean of s and half its variance, for small s; so the error falls with s^3."""
    given = seen(torch.Generator().manual_seed(0))
    given.read[:] = False
    cells = (torch.arange(88) < 64, torch.arange(88) >= 64)
    assert all(cell.any() for cell in cells)
    for scale, most in ((0.02, 1e-4), (0.01, 2e-5)):
        exact = (torch.einsum("nhc,rhc->hnr", given.queries, given.keys) * scale).exp().sum(-1)
        errors = []
        for way in ("means 4x4", "second order"):
            points = WAYS[way].make(given)
            errors.append(
                float((points.scores(given.queries, given.groups, scale).exp().sum(-1) / exact - 1).abs().max())
            )
        assert errors[1] < most < errors[0]


def test_the_table_has_a_line_for_what_was_measured(tmp_path):
    rows = Rows(tmp_path / "rest.csv", (*cases.KEYS, *cases.VALUES), keys=cases.KEYS, digits=DIGITS)
    for case in rest.cases(12):
        if case.method not in ("dense", "means 4x4", "means 4x2", "means 2x2"):
            continue
        for subject in range(3):
            key = {
                "model": "dense",
                "weights": "w",
                "steps": 12,
                "task": case.asked(subject),
                "subject": subject,
                "seed": 0,
            }
            values = dict.fromkeys(cases.VALUES, len(case.method) + subject)
            rows.add([{**key, "method": case.method, "keep": case.keep, **values}])
    lines = rests(tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| means 4x2", "| means 2x2"]
    assert "| 3, 6 | +0.00 [+0.00, +0.00] |" in lines[2]
    with pytest.raises(ValueError, match="must hold rows of the study 'rest'"):
        rests(tmp_path / "none")

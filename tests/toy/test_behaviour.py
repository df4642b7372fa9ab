"""The model that ships behaves as the library is built to use: it looks at the subject, and a recolour at everything.

Margins are about half of what was measured; each test fails with the ranking drawn at random or reversed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from benchmarks.studies.generator import Generator
from benchmarks.studies.mass import covered
from benchmarks.studies.questions import Question, held_out
from sparse_ref_attn.config import UniformGuard
from sparse_ref_attn.eval.methods import dense_first
from sparse_ref_attn.eval.models import EvalModel
from sparse_ref_attn.eval.scores import Scorer
from sparse_ref_attn.run.profile import top_quarter
from sparse_ref_attn.selection import AttentionMass
from sparse_ref_attn.toy.pipeline import TRAINED

STEPS = 4
SUBJECTS = range(4)
QUARTER = dense_first(0.25)
UNIFORM = 0.345
"""Share of the mass in the top quarter of the tokens, over all blocks, between recolours' and placed subjects'."""


@pytest.fixture(scope="module")
def generator():
    return Generator(EvalModel("dense", TRAINED, steps=STEPS))


def run(generator, question, config, steps=STEPS):
    with torch.no_grad(), sra.patched(generator.pipe, config) as handle:
        picture = generator.picture(question, 0, steps)
    return picture, handle.record


@pytest.fixture(scope="module")
def placed(generator):
    """Of each held-out subject: PSNR of mass and of random at a quarter of the tokens, and the record of the mass."""
    found, measure = [], "subject PSNR (dB) vs target"
    scorer = Scorer(held_out("place"), only=[measure])
    for subject in SUBJECTS:
        question = Question("place", subject)
        pictures, records = zip(
            *(run(generator, question, sra.SparseRef(select, QUARTER)) for select in ("mass", "random")), strict=True
        )
        score = scorer.scores(question.example, pictures[1])
        quality = [score(picture)[measure] for picture in pictures]
        found.append((quality, records[0], question))
    return found


@pytest.fixture(scope="module")
def guarded(generator):
    """By task the records of ReCAST's first step and its last, with a guard that looks at all blocks."""
    config = sra.ReCAST(select=AttentionMass(blocks="all"), guard=UniformGuard(UNIFORM))
    return {
        task: [run(generator, Question(task, subject), config, steps=2)[1] for subject in SUBJECTS[:3]]
        for task in ("place", "global")
    }


def share(record):
    """Of the mass, in the top quarter of the tokens; 0.25 is uniform."""
    return float(top_quarter(record.mass[0][None])[0])


def test_mass_beats_random_at_a_quarter_of_the_tokens(placed):
    lead = [mass - random for (mass, random), _, _ in placed]
    assert np.mean(lead) > 2.0, lead


def test_the_ranking_finds_the_subject(placed):
    """Of the n tokens that are the subject's, the share among the ranking's first n; by chance n / 256."""
    recall, chance = [], []
    for _, record, question in placed:
        cover = covered(question)
        n = int(cover.sum())
        recall.append(float(cover[record.scores[0].argsort(descending=True)[:n]].float().mean()))
        chance.append(n / len(cover))
    assert np.mean(chance) < 0.26
    assert np.mean(recall) > np.mean(chance) + 0.2, recall


def test_a_global_recolour_looks_everywhere(guarded):
    even, looked = ([share(record) for record in guarded[task]] for task in ("global", "place"))
    assert max(even) < UNIFORM < min(looked), (even, looked)


def test_the_guard_follows(guarded):
    """More is kept on a recolour than the budget asks for, and what it asks for where a subject is looked at."""
    most = round(sra.ReCAST().budget.high * 256)
    for record in guarded["global"]:
        assert any("spread evenly" in note for note in record.notes)
        assert record.steps[-1].kept > 2 * most
    for record in guarded["place"]:
        assert record.notes == []
        assert record.steps[-1].kept == most


def test_keeping_everything_is_bit_identical(generator):
    question = Question("pair", 0)
    with torch.no_grad():
        dense = generator.picture(question, 0, 2)
        kept, _ = run(generator, question, sra.SparseRef("mass", 1.0), 2)
        dropped, _ = run(generator, question, sra.SparseRef("mass", 0.25), 2)
        after = generator.picture(question, 0, 2)
    assert np.array_equal(dense, kept)
    assert np.array_equal(dense, after)
    assert not np.array_equal(dense, dropped)

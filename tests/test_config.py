"""The configuration and the papers' presets: values, refusals, JSON."""

import re

import numpy as np
import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.config import UniformGuard
from sparse_ref_attn.schedules import Clock
from sparse_ref_attn.selection import Reducer


@pytest.mark.parametrize(
    "config",
    [
        sra.ReCAST(),
        sra.ReCAST(128, 512, 1.5, task="style", multiple=64, clock="sigma"),
        sra.SparseContext(0.05, task="auto"),
        sra.SparseContext(300, "saliency", floor=0.02, seed=7),
        sra.SparseRef(sra.Mix({sra.Edges(): 2.0, sra.Grid(): 1.0}), sra.TopP(0.8, max_tokens=1024), weights=(1, 2.5)),
        sra.SparseRef(sra.Union((sra.AttentionMass(range(20, 57)), sra.Random())), sra.Descending(0.5, 0.1)),
        sra.SparseRef(sra.Boxes((((0.0, 0.0, 0.5, 0.5),),)), sra.Linear(0.1, 0.2).piecewise(3)),
    ],
)
def test_a_configuration_survives_json(config):
    assert sra.SparseRef.from_json(config.to_json()) == config


def test_recast_is_equation_4_with_the_papers_numbers_at_4096_tokens():
    budget = sra.ReCAST().budget
    counts = [budget.counts(Clock.uniform(i, 28), (4096,))[0] for i in range(28)]
    expected = [256 + (1024 - 256) * (i / 27) ** 2 for i in range(28)]
    assert all(abs(count - exact) <= 0.5 for count, exact in zip(counts, expected, strict=True))
    assert budget.counts(Clock.uniform(27, 28), (1024, 4096)) == (256, 1024)  # scales with each reference


def test_a_float_is_a_share_and_an_int_a_number_of_tokens():
    """`ReCAST(0.1, 0.25)` was a tenth and a quarter of a token, and kept one."""
    for config in (sra.ReCAST(0.25, 0.5), sra.ReCAST(1024, 2048), sra.ReCAST(0.25, 2048)):
        assert config.budget == sra.Polynomial(0.25, 0.5)
    assert [sra.ReCAST(0.25, 0.5).budget.counts(Clock.uniform(i, 2), (100,)) for i in (0, 1)] == [(25,), (50,)]
    assert sra.SparseContext(0.25).budget.counts(Clock.uniform(0, 2), (100,)) == (25,)
    assert sra.SparseContext(25).budget.counts(Clock.uniform(0, 2), (100,)) == (25,)


def test_tasks_choose_the_rule_and_the_guard():
    assert sra.ReCAST().guard == UniformGuard()
    assert sra.ReCAST(task="subject").guard is None
    assert isinstance(sra.ReCAST(task="style").select, sra.Mix)
    rules = {task: sra.SparseContext(task=task) for task in ("edit", "subject", "style", "auto")}
    assert [type(c.select).__name__ for c in rules.values()] == ["Edges", "Saliency", "Grid", "Edges"]
    assert [c.guard is None for c in rules.values()] == [True, True, True, False]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sra.SparseRef(budget=0.0), "0"),
        (lambda: sra.SparseRef(budget=1.5), "1.5"),
        (lambda: sra.SparseRef(budget=True), "True"),
        (lambda: sra.SparseRef(select="magic"), "magic"),
        (lambda: sra.SparseRef(execute="later"), "tokens"),
        (lambda: sra.SparseRef(floor=1.2), "1.2"),
        (lambda: sra.SparseRef(floor=-1), "-1"),
        (lambda: sra.SparseRef(multiple=0), "multiple"),
        (lambda: sra.SparseRef(weights=(1.0, -2.0)), "weights"),
        (lambda: sra.SparseRef(weights=()), "weights"),
        (lambda: sra.SparseRef(weights=("a",)), "weights must be finite numbers"),
        (lambda: sra.SparseRef(weights=3), "weights must be finite numbers"),
        (lambda: sra.SparseRef(execute="both", layers=2), "layers must be factors"),
        (lambda: sra.SparseRef(execute="both", layers=("a",)), "layers must be factors"),
        (lambda: sra.SparseRef(execute=np.array(["tokens", "both"])), "execute must be one of"),
        (lambda: sra.SparseRef(guard="yes"), "guard must be a UniformGuard or None, got 'yes'"),
        (lambda: UniformGuard(mass="half"), "guard mass must lie in"),
        (lambda: sra.SparseRef(seed=2**64), "seed must fit torch's generators"),
        (lambda: sra.ReCAST("few"), "n_min must be a number of tokens"),
        (lambda: sra.ReCAST(0.1, 1024.0), "n_max must be a number of tokens (int >= 1) or a ratio"),
        (lambda: sra.ReCAST(True, 1024), "n_min must be a number of tokens"),
        (lambda: sra.ReCAST(0.5, 1024), "n_min <= n_max <= reference_tokens must hold, got 0.5, 1024, 4096"),
        (
            lambda: sra.ReCAST(0.1, 0.25, reference_tokens=4096.0),
            "reference_tokens must be an int of at least 1, got 4096.0",
        ),
        (lambda: sra.Constant(0.5, per=np.ones(2)), "per must be"),
        (lambda: sra.SparseRef.from_json("3"), "fields of SparseRef, got 3"),
        (lambda: sra.SparseRef.from_dict({"select": {"kind": "grid"}, "budget": "half"}), "budget's kind"),
        (lambda: sra.SparseRef(clock="hours"), "clock"),
        (lambda: sra.SparseRef(seed=0.5), "seed"),
        (lambda: sra.SparseRef(Reducer(), guard=UniformGuard()), "guard"),
        (lambda: sra.ReCAST(512, 256), "n_min"),
        (lambda: sra.ReCAST(gamma=0), "gamma"),
        (lambda: sra.ReCAST(task="poem"), "poem"),
        (lambda: UniformGuard(top_quarter=0.1), "top_quarter"),
        (lambda: sra.SparseRef.from_json("{"), "JSON"),
        (lambda: sra.SparseRef.from_dict({"budget": 0.5}), "fields"),
    ],
)
def test_what_cannot_hold_is_refused_with_the_value(make, words):
    with pytest.raises(sra.ConfigError, match=re.escape(words)):
        make()


def test_what_holds_a_function_does_not_travel_to_json():
    with pytest.raises(sra.ConfigError):
        sra.SparseRef(sra.FromFunction(lambda references: [])).to_json()

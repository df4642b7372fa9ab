"""Budgets: eq. (4) by hand, bounds, direction, scaling with size, top-p against brute force, JSON, bad input."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_ref_attn.errors import BudgetError, ConfigError, NonFiniteError, SparseRefError
from sparse_ref_attn.schedules import (
    Budget,
    Clock,
    Constant,
    Cosine,
    Descending,
    Linear,
    Pieces,
    Polynomial,
    TopP,
    budget,
    from_dict,
    round_joint,
)

RISING = [Polynomial, Linear, Cosine]
ratios = st.floats(0.01, 1.0)
sizes_ = st.lists(st.integers(1, 5000), min_size=1, max_size=4)
steps_ = st.integers(1, 60)


def run(b: Budget, sizes: list[int], steps: int) -> list[tuple[int, ...]]:
    return [b.counts(Clock.uniform(i, steps), sizes) for i in range(steps)]


# --- the clock and eq. (4)


def test_the_clock_runs_from_noise_to_image():
    assert [Clock.uniform(i, 3).progress for i in range(3)] == [0.0, 0.5, 1.0]
    assert Clock.uniform(0, 1).progress == 0.0


@pytest.mark.parametrize("bad", [(-1, 4, 0.0), (4, 4, 1.0), (0, 4, -0.1), (0, 4, 1.1), (0, 4, math.nan)])
def test_the_clock_refuses_what_is_not_on_it(bad):
    with pytest.raises(ConfigError):
        Clock(*bad)


def test_equation_4_by_hand():
    """256 + 768 (1 - t/T)^2 in exact rationals, rounded half up; the values of steps 0, 9, 14, 27 of 28 are literal."""
    got = [c for (c,) in run(Polynomial(256, 1024, gamma=2.0), [4096], 28)]
    exact = [256 + 768 * Fraction(i, 27) ** 2 for i in range(28)]
    assert got == [math.floor(e + Fraction(1, 2)) for e in exact]
    assert (got[0], got[9], got[14], got[27]) == (256, 341, 462, 1024)


def test_recast_averages_517_tokens_not_600():
    b = Polynomial(256, 1024)
    assert b.mean_tokens([4096], 28, dense_steps=0) == pytest.approx(517.0, abs=0.5)
    assert b.mean_tokens([4096], 28) == pytest.approx(654.1, abs=0.5)


def test_a_ratio_gives_the_same_schedule_as_the_papers_numbers():
    assert run(Polynomial(1 / 16, 1 / 4), [4096], 28) == run(Polynomial(256, 1024), [4096], 28)


def test_linear_and_descending_against_their_formulas():
    assert run(Linear(100, 200), [200], 5) == [(100,), (125,), (150,), (175,), (200,)]
    assert run(Descending(high=1024, low=256, gamma=2.0), [4096], 28) == run(Polynomial(256, 1024), [4096], 28)[::-1]
    assert run(Cosine(0.1, 0.9), [1000], 3) == [(100,), (500,), (900,)]
    # a quarter of the way: (1 - cos 45 deg) / 2 = 0.146447
    assert Cosine(0.1, 0.9).counts(Clock(1, 5, 0.25), [1000]) == (round(100 + 800 * 0.1464466),)


# --- properties


@given(st.sampled_from(RISING), ratios, ratios, sizes_, steps_)
def test_rising_budgets_rise_and_stay_within_bounds(kind, a, b, sizes, steps):
    low, high = sorted((a, b))
    counts = run(kind(low, high), sizes, steps)
    for i, size in enumerate(sizes):
        column = [c[i] for c in counts]
        assert column == sorted(column)
        assert all(max(1, low * size - 0.51) <= c <= max(1, high * size + 0.51) for c in column)
        assert all(isinstance(c, int) and 1 <= c <= size for c in column)


@given(ratios, ratios, st.floats(0.1, 5.0), st.integers(1, 5000), steps_)
def test_descending_budgets_fall_from_high_to_low(a, b, gamma, size, steps):
    low, high = sorted((a, b))
    column = [c for (c,) in run(Descending(high, low, gamma), [size], steps)]
    assert column == sorted(column, reverse=True)
    assert column[0] == Constant(high).counts(Clock.uniform(0, 1), [size])[0]
    if steps > 1:
        assert column[-1] == Constant(low).counts(Clock.uniform(0, 1), [size])[0]


@given(st.sampled_from([*RISING, lambda low, high: Descending(high, low)]), ratios, ratios, st.integers(1, 9), steps_)
def test_piecewise_holds_few_values_within_the_original_bounds(kind, a, b, pieces, steps):
    low, high = sorted((a, b))
    smooth = kind(low, high)
    held = smooth.piecewise(pieces)
    values = [c for (c,) in run(held, [1000], steps)]
    assert len(set(values)) <= pieces
    assert len([1 for x, y in pairwise(values) if x != y]) <= pieces - 1
    ends = [c for (c,) in run(smooth, [1000], 2)]
    assert min(ends) <= min(values) <= max(values) <= max(ends)


def test_piecewise_takes_the_middle_of_each_part():
    held = Linear(0.0001, 1.0).piecewise(2)
    middle = [Linear(0.0001, 1.0).counts(Clock(0, 1, p), [4096]) for p in (0.25, 0.75)]
    assert run(held, [4096], 5) == [middle[0], middle[0], middle[1], middle[1], middle[1]]


@given(ratios, st.integers(1, 2000), st.integers(1, 5))
def test_ratios_scale_with_each_reference(keep, size, times):
    one, many = Constant(keep).counts(Clock.uniform(0, 1), [size, size * times])
    assert abs(many - times * one) <= (times + 1) / 2 + 1e-6 or one == 1
    assert Constant(keep).counts(Clock.uniform(0, 1), [size * times]) == (many,)


def test_rounding_is_half_up_and_at_least_one():
    at = Clock.uniform(0, 1)
    assert Constant(0.5).counts(at, [5]) == (3,)
    assert Constant(0.3).counts(at, [5]) == (2,)  # 1.5
    assert Constant(0.29).counts(at, [50]) == (15,)  # 14.5, though 0.29 * 50 is 14.499999999999998 in floats
    assert Constant(0.01).counts(at, [5]) == (1,)
    assert Constant(1.0).counts(at, [5, 7]) == (5, 7)


def test_per_all_gives_one_total():
    at = Clock.uniform(0, 1)
    assert Constant(0.25, per="all").counts(at, [1000, 3000]) == (1000,)
    assert Constant(1500, per="all").counts(at, [1000, 3000]) == (1500,)
    assert Constant(0.25).counts(at, [1000, 3000]) == (250, 750)


def test_pieces_change_at_their_boundaries():
    b = Pieces(keeps=(10, 0.5, 1.0), at=(0.25, 0.5))
    assert run(b, [100], 5) == [(10,), (50,), (100,), (100,), (100,)]
    assert b.varies == "pieces"


def test_how_a_budget_varies():
    assert Constant(0.5).varies == "never"
    assert Linear(0.5, 0.5).varies == "never"
    assert Pieces((0.5, 0.5), (0.5,)).varies == "never"
    assert Linear(0.1, 0.5).varies == "every step"
    assert Linear(0.1, 0.5).piecewise(3).varies == "pieces"
    assert Linear(0.1, 0.5).piecewise(1).varies == "never"
    assert TopP(0.9).varies == "never"
    assert Constant(0.5).piecewise(3) == Constant(0.5)
    assert [b.needs_mass for b in (Constant(1), TopP(0.5), Linear(0.1, 0.2).piecewise(2))] == [False, True, False]


@given(st.sampled_from([Constant(0.2), Linear(0.1, 0.7), Pieces((0.1, 0.9), (0.3,))]), sizes_, st.integers(1, 30))
def test_the_mean_is_the_mean_of_what_runs(b, sizes, steps):
    dense = min(2, steps)
    truth = [sum(sizes) if i < dense else sum(c) for i, c in enumerate(run(b, sizes, steps))]
    assert b.mean_tokens(sizes, steps, dense_steps=dense) == pytest.approx(sum(truth) / steps)


# --- top-p


@settings(max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.sampled_from([0.1, 0.5, 0.75, 0.9, 1.0]))
@example([2, 2, 2, 2, 2, 50], 0.9)  # 54 of 60 hold nine tenths, if not the float of that name
def test_top_p_is_the_smallest_count_that_holds_the_share(weights, p):
    """Truth: try every subset, with the share as it is written. Weights are integers, so that sums are exact."""
    mass = [torch.tensor(weights, dtype=torch.float32)]
    (count,) = TopP(p).counts(Clock.uniform(0, 1), [len(weights)], mass)
    need = Fraction(str(p)) * sum(weights)
    holding = [n for n in range(1, len(weights) + 1) if any(sum(s) >= need for s in combinations(weights, n))]
    assert count == holding[0]


def test_top_p_per_reference_and_over_all():
    at = Clock.uniform(0, 4)
    mass = [torch.tensor([8.0, 1.0, 1.0, 0.0]), torch.full((4,), 0.25)]
    assert TopP(0.75).counts(at, [4, 4], mass) == (1, 3)
    assert TopP(0.75, per="all").counts(at, [4, 4], mass) == (2,)  # 8 + 1 of 11 >= 8.25


def test_top_p_bounds():
    at, mass = Clock.uniform(0, 4), [torch.tensor([0.97, 0.01, 0.01, 0.01])]
    assert TopP(0.5).counts(at, [4], mass) == (1,)
    assert TopP(0.5, min_tokens=3).counts(at, [4], mass) == (3,)
    assert TopP(0.5, min_tokens=0.5).counts(at, [4], mass) == (2,)
    assert TopP(1.0, max_tokens=2).counts(at, [4], mass) == (2,)
    assert TopP(1.0, max_tokens=1024).counts(at, [4], mass) == (4,)
    assert TopP(0.5).mean_tokens([4], 4, dense_steps=1, mass=mass) == (4 + 3) / 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_top_p_refuses_mass_that_is_not_a_mass(bad):
    with pytest.raises(NonFiniteError):
        TopP(0.5).counts(Clock.uniform(0, 1), [2], [torch.tensor([1.0, bad])])


def test_top_p_says_what_it_misses():
    at = Clock.uniform(0, 1)
    with pytest.raises(BudgetError, match="profiling"):
        TopP(0.5).counts(at, [4])
    with pytest.raises(BudgetError, match=r"\(3,\)"):
        TopP(0.5).counts(at, [4], [torch.ones(3)])
    with pytest.raises(BudgetError, match="reference 0 has 4 tokens"):
        TopP(0.5, min_tokens=5).counts(at, [4], [torch.ones(4)])
    with pytest.raises(BudgetError, match="min_tokens must not exceed max_tokens"):
        TopP(0.5, min_tokens=3, max_tokens=0.25).counts(at, [4], [torch.ones(4)])


# --- the joint length


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 6000), st.sampled_from([1, 2, 8, 64, 100]))
def test_round_joint_is_the_smallest_that_fits(kept, spare, other, multiple):
    available = kept + spare
    fitting = [k for k in range(kept, available + 1) if (other + k) % multiple == 0]
    assert round_joint(kept, other, multiple, available) == (fitting[0] if fitting else available)


def test_round_joint_rounds_the_joint_length_not_the_kept_count():
    assert round_joint(64, 10, 64, 4096) == 118


@pytest.mark.parametrize("bad", [(5, 0, 0, 9), (5, -1, 8, 9), (10, 0, 8, 9), (-1, 0, 8, 9)])
def test_round_joint_refuses(bad):
    with pytest.raises(BudgetError):
        round_joint(*bad)


# --- JSON


@pytest.mark.parametrize(
    "b",
    [
        Constant(512, per="all"),
        Constant(1.0),
        Constant(1),
        Polynomial(256, 0.25, gamma=1.5),
        Linear(0.1, 0.2, per="all"),
        Cosine(1, 2),
        Descending(0.5, 0.1),
        TopP(0.8, min_tokens=4, max_tokens=0.5),
        Pieces((0.1, 20), (0.5,)),
        Linear(0.1, 0.2, per="all").piecewise(3),
    ],
)
def test_json_round_trip(b):
    back = from_dict(json.loads(json.dumps(b.to_dict())))
    assert back == b
    assert repr(back) == repr(b)  # 1 and 1.0 are equal but mean different things


def test_a_budget_of_ones_own_travels_too():
    @dataclass(frozen=True)
    class Sawtooth(Budget):
        high: int
        per: str = "reference"

        def amounts(self):
            return {"high": self.high}

        def tokens_at(self, clock, size):
            return self.high / (1 + clock.index % 2)

    b = from_dict(json.loads(json.dumps(Sawtooth(8).to_dict())))
    assert run(b, [10], 4) == [(8,), (4,), (8,), (4,)]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "Nothing"},
        {"kind": "_Curve"},
        {"kind": "Constant", "keep": 2.0},
        {"kind": "Constant", "kept": 0.5},
        {"kind": "Constant"},
    ],
)
def test_from_dict_refuses(data):
    with pytest.raises(ConfigError):
        from_dict(data)


# --- bad input


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, -0.1, math.nan, math.inf, True, False, None, "0.5"])
def test_amounts_outside_their_range(keep):
    makers = [Constant, budget, lambda k: Linear(k, 1.0), lambda k: Descending(1.0, k), lambda k: Pieces((k,), ())]
    if keep is not None:
        makers.append(lambda k: TopP(0.5, min_tokens=k))
    for make in makers:
        with pytest.raises(ConfigError):
            make(keep)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Polynomial(1024, 256),
        lambda: Linear(0.5, 0.4),
        lambda: Cosine(0.5, 0.4),
        lambda: Descending(high=256, low=1024),
        lambda: Polynomial(1, 2, gamma=0),
        lambda: Polynomial(1, 2, gamma=math.nan),
        lambda: Descending(2, 1, gamma=-1.0),
        lambda: TopP(0.0),
        lambda: TopP(1.1),
        lambda: TopP(math.nan),
        lambda: TopP(True),
        lambda: TopP(0.5, min_tokens=3, max_tokens=2),
        lambda: Pieces((), ()),
        lambda: Pieces((0.1,), (0.5,)),
        lambda: Pieces((0.1, 0.2), (1.0,)),
        lambda: Pieces((0.1, 0.2, 0.3), (0.5, 0.5)),
        lambda: Pieces((0.1, 0.2), ("a",)),
        lambda: Pieces([0.1, 0.2], (0.5,)),
        lambda: Constant(0.5, per="image"),
        lambda: Linear(0.1, 0.5).piecewise(0),
        lambda: Linear(0.1, 0.5).piecewise(2.0),
    ],
)
def test_settings_outside_their_range(make):
    with pytest.raises(ConfigError):
        make()


def test_too_many_tokens_are_refused_at_the_first_step_with_the_numbers():
    """The upper end of a rising budget is reached last; the error must not wait for it."""
    with pytest.raises(BudgetError, match="high = 1024, and reference 1 has 1000 tokens"):
        Polynomial(256, 1024).counts(Clock.uniform(0, 28), [4096, 1000])
    with pytest.raises(BudgetError, match="all references together has 5"):
        Constant(6, per="all").counts(Clock.uniform(0, 1), [2, 3])
    with pytest.raises(BudgetError, match="low must not exceed high"):
        Linear(64, 0.25).counts(Clock.uniform(0, 1), [100])
    for sizes in ([], [0], [4, 0]):
        with pytest.raises(BudgetError):
            Constant(0.5).counts(Clock.uniform(0, 1), sizes)
    for dense in (-1, 5):
        with pytest.raises(BudgetError):
            Constant(0.5).mean_tokens([4], 4, dense_steps=dense)


@given(
    st.sampled_from([Constant, lambda k: Linear(k, 0.5), lambda k: Descending(k, 2), lambda k: TopP(k), budget]),
    st.one_of(st.integers(-3, 9000), st.floats(allow_nan=True), st.booleans(), st.none()),
    st.lists(st.integers(-1, 4096), max_size=3),
)
def test_nothing_but_the_librarys_own_errors(make, keep, sizes):
    try:
        counts = make(keep).counts(Clock.uniform(0, 3), sizes)
    except SparseRefError:
        return
    assert all(1 <= c <= size for c, size in zip(counts, sizes, strict=True))


def test_a_number_becomes_a_constant():
    assert budget(0.25) == Constant(0.25)
    assert budget(512) == Constant(512)
    b = TopP(0.5)
    assert budget(b) is b

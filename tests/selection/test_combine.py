"""Laws of Mix and Union."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.selection import AttentionMass, Cosine, Edges, FromFunction, Grid, Mix, SelfAttention, Union
from sparse_ref_attn.selection.combine import mean_ranks

from .scenes import references

GRIDS = [(3, 5), (1, 1), (4, 4)]


def fixed(*scores):
    return FromFunction(lambda refs: [torch.tensor(s) for s in scores])


def coarse(seed, constant=False):
    """Scores of GRIDS with many ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 5, (h * w,), generator=generator).float() for h, w in GRIDS]
    return FromFunction(lambda refs: [torch.zeros_like(s) if constant else s for s in scores])


def ordered(scores):
    return torch.cat(scores).sort(descending=True, stable=True).indices


def test_mean_ranks_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = torch.randint(0, 9, (40,), generator=torch.Generator().manual_seed(0)).float()
    assert mean_ranks(values).tolist() == (stats.rankdata(values.numpy()) - 1).tolist()


def test_a_mix_of_one_orders_as_it():
    refs, only = references(GRIDS), coarse(0)
    assert torch.equal(ordered(Mix({only: 7.0}).score(refs)), ordered(only.score(refs)))


def test_an_indifferent_part_and_the_scale_of_weights_change_nothing():
    refs, a, b, flat = references(GRIDS), coarse(1), coarse(2), coarse(3, constant=True)
    mix = ordered(Mix({a: 2, b: 1}).score(refs))
    assert torch.equal(mix, ordered(Mix([(b, 50.0), (a, 100.0)]).score(refs)))
    assert torch.equal(mix, ordered(Mix({a: 2, flat: 9, b: 1}).score(refs)))


def test_a_mix_does_not_depend_on_the_scale_of_scores():
    refs, a, b = references(GRIDS), coarse(1), coarse(2)
    skewed = FromFunction(lambda refs: [1e-6 * s.exp() ** 4 for s in a.score(refs)])
    assert torch.equal(torch.cat(Mix({a: 1, b: 1}).score(refs)), torch.cat(Mix({skewed: 1, b: 1}).score(refs)))


def test_mix_is_the_mean_rank():
    refs = references([(1, 3)])
    mix = Mix([(fixed([0.1, 0.2, 0.9]), 3), (fixed([5.0, 5.0, -1.0]), 1)])
    torch.testing.assert_close(mix.score(refs)[0], torch.tensor([0.75 / 4, (1.5 + 0.75) / 4, 3 / 4]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(0, 999))
def test_every_selector_of_a_union_gets_its_share(count, seed):
    refs = references(GRIDS)
    parts = [coarse(seed + m) for m in range(count)]
    union = Union(parts).score(refs)
    for i, score in enumerate(union):
        assert score.unique().numel() == score.numel()
        best = score.sort(descending=True, stable=True).indices
        for part in parts:
            wanted = part.score(refs)[i].sort(descending=True, stable=True).indices
            for kept in range(len(score) + 1):
                assert set(wanted[: kept // count].tolist()) <= set(best[:kept].tolist())


def test_union_takes_turns():
    union = Union([fixed([9.0, 8.0, 0.0, 0.0, 1.0]), fixed([0.0, 1.0, 9.0, 8.0, 0.0])])
    assert ordered(union.score(references([(1, 5)]))).tolist() == [0, 2, 1, 3, 4]


def test_a_union_of_one_orders_as_it():
    refs, only = references([(5, 5)]), coarse(0)
    only = FromFunction(lambda refs: [torch.arange(25.0) % 4])
    assert torch.equal(ordered(Union([only]).score(refs)), ordered(only.score(refs)))


def test_probes_are_the_childrens_once():
    nested = Mix({Union([AttentionMass(), Grid()]): 1, AttentionMass(): 1, SelfAttention(): 1})
    assert nested.probes() == AttentionMass().probes() + SelfAttention().probes()


def test_equal_settings_are_equal():
    assert Mix({Grid(): 1}) == Mix([(Grid(), 1.0)])
    assert len({Union([Edges()]), Union((Edges(),)), Mix({Edges(): 2})}) == 2


@pytest.mark.parametrize("make", [lambda s: Mix({s: 1, Cosine(): 2}), lambda s: Union([Cosine(), s])])
def test_nan_is_not_hidden(make):
    score = make(fixed([0.0, torch.nan, 1.0, 2.0])).score(references([(2, 2)]))[0]
    assert score.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("parts", [{}, [], [(Grid(), 0)], [(Grid(), float("nan"))], [("grid", 1)], [Grid()]])
def test_bad_mixes(parts):
    with pytest.raises(ConfigError, match="mix"):
        Mix(parts)


@pytest.mark.parametrize("selectors", [[], ["edges"], [Grid(), None]])
def test_bad_unions(selectors):
    with pytest.raises(ConfigError, match="union"):
        Union(selectors)

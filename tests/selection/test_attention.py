"""Attention selectors ask for their probe and read exactly that."""

from __future__ import annotations

import pytest
import torch

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.selection import AttentionMass, Probe, Random, SelfAttention

from .scenes import recall, references


def test_probes_say_what_to_measure():
    mass = AttentionMass(blocks=[3, 5], steps=range(2), query_stride=4, value_norm=True)
    assert mass.probes() == (Probe("generation", (3, 5), (0, 1), 4, True),)
    assert AttentionMass().probes() == (Probe("generation", "single", (0,), 1, False),)
    assert SelfAttention("double", [1]).probes() == (Probe("reference", "double", (1,), 1, False),)


def test_lists_and_ranges_are_the_same_setting():
    assert AttentionMass(range(2, 4)) == AttentionMass([2, 3]) == AttentionMass((2, 3))
    assert hash(AttentionMass(range(2, 4))) == hash(AttentionMass((2, 3)))


@pytest.mark.parametrize("selector", [AttentionMass("all", value_norm=True), SelfAttention((0, 1))])
def test_reads_its_own_probe_and_finds_the_subject(selector):
    subject = torch.zeros(6 * 9)
    subject[[13, 14, 15, 22, 23, 24, 31, 32, 33]] = 1
    attention = torch.cat([0.001 + 0.01 * subject, torch.tensor([0.5])]).double()
    other = Probe("generation", "double")
    refs = references([(6, 9), (1, 1)], attention={selector.probes()[0]: attention, other: -attention})
    scores = selector.score(refs)
    assert [s.shape for s in scores] == [(54,), (1,)]
    assert torch.equal(scores[0], attention[:54].float())
    assert recall(scores[0], subject) == 1.0
    assert recall(Random().score(refs)[0], subject) <= 0.6


def test_missing_or_misshapen_attention_is_refused():
    refs = references([(2, 2)], attention={Probe(): torch.ones(4)})
    AttentionMass().score(refs)
    with pytest.raises(LayoutError, match="profiling step"):
        AttentionMass(steps=(0, 1)).score(refs)
    refs.attention = {Probe(): torch.ones(5)}
    with pytest.raises(LayoutError, match=r"\(4,\), got \(5,\)"):
        AttentionMass().score(refs)


def test_nan_is_not_hidden():
    refs = references([(1, 2)], attention={Probe(): torch.tensor([torch.nan, 1.0])})
    assert AttentionMass().score(refs)[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("cls", [AttentionMass, SelfAttention])
@pytest.mark.parametrize(
    "bad",
    [
        *({"blocks": bad} for bad in ("some", (), (-1,), (True,), 3, torch.tensor(1))),
        *({"steps": bad} for bad in (0, (), (0.5,), "0", (1, 1))),
    ],
)
def test_settings_out_of_range(cls, bad):
    with pytest.raises(ConfigError, match="must"):
        cls(**bad)


@pytest.mark.parametrize("stride", [0, -1, 1.5, True])
def test_query_stride(stride):
    with pytest.raises(ConfigError, match="query_stride"):
        AttentionMass(query_stride=stride)


@pytest.mark.parametrize("value", ["yes", 1, [True]])
def test_value_norm_is_a_switch(value):
    with pytest.raises(ConfigError, match="value_norm must be True or False"):
        AttentionMass(value_norm=value)

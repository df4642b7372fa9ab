"""Selectors by name and through JSON."""

from __future__ import annotations

import json

import pytest
import torch

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.selection import (
    AttentionMass,
    Boxes,
    Cosine,
    Edges,
    FromFunction,
    Grid,
    Learned,
    Mix,
    Random,
    Ranking,
    Saliency,
    SavedRanking,
    Selector,
    SelfAttention,
    SubjectMask,
    Union,
    selector,
)
from sparse_ref_attn.selection.names import NAMES, from_dict, to_dict

EVERY = [
    Random(),
    Grid(),
    Edges(1.5, 0.2, 0.4, "use"),
    Saliency("use"),
    Cosine("similar"),
    SelfAttention((1, 2), (0, 3)),
    AttentionMass("all", (1,), 4, True),
    Learned(),
    Learned("head.safetensors"),
    Boxes([[(0, 0, 0.5, 1), (0.2, 0.2, 1, 1)], None]),
]
EVERY += [Mix({s: i + 1 for i, s in enumerate(EVERY)}), Union([Mix({Union([Edges()]): 0.5, Grid(): 1})])]


@pytest.mark.parametrize("choice", EVERY, ids=lambda s: type(s).__name__)
def test_json_round_trip(choice):
    assert from_dict(json.loads(json.dumps(to_dict(choice)))) == choice


def test_names_give_defaults():
    assert set(NAMES) == {"random", "grid", "edges", "saliency", "cosine", "self-attention", "mass", "learned"}
    for name, cls in NAMES.items():
        assert selector(name) == cls()
        assert to_dict(selector(name))["kind"] == name
    mine = Edges(3.0)
    assert selector(mine) is mine


@pytest.mark.parametrize("choice", ["canny", "", None, 3, Edges])
def test_unknown_names_list_the_known(choice):
    with pytest.raises(ConfigError, match=r"random, grid, edges.*mass"):
        selector(choice)


class Own(Selector):
    """A user's selector."""


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (FromFunction(lambda refs: []), "function"),
        (SubjectMask(torch.ones(2, 2)), "pixels"),
        (SavedRanking(Ranking([torch.ones(1)], [None], "M", "")), "path"),
        (Own(), "library's own"),
        (Mix({Grid(): 1, Own(): 1}), "library's own"),
    ],
)
def test_what_cannot_travel_says_why(choice, reason):
    with pytest.raises(ConfigError, match=reason):
        to_dict(choice)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "own"},
        {"kind": ["edges"]},
        {"kind": "edges", "width": 1},
        {"kind": "union"},
        {"kind": "cosine", "sign": "up"},
        {"kind": "edges", "sigma": "wide"},
        {"kind": "mix", "parts": 3},
        {"kind": "union", "selectors": 3},
        "edges",
    ],
)
def test_bad_dicts(data):
    with pytest.raises(ConfigError, match="must"):
        from_dict(data)

"""What an edit asks for is what the library does under the same names."""

from __future__ import annotations

from typing import Any

import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.app.edit import Edit
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.eval.ways import WAYS
from sparse_ref_attn.execution import Cache
from sparse_ref_attn.models import named_model
from sparse_ref_attn.refresh import Every, Never
from sparse_ref_attn.vocabulary import CHOSEN_PRESETS, METHODS, PRESETS


@pytest.fixture(scope="module")
def kontext() -> Any:
    return named_model("kontext", num_layers=2, num_single_layers=2)


def test_a_preset_that_keeps_all_has_no_share() -> None:
    assert (edit().words, edit(way="edges").words) == ("balanced", "edges at 25 %")


def edit(**settings: Any) -> Edit:
    return Edit(("photo.png",), "a cup", **settings)


def test_the_ways_are_the_vocabulary() -> None:
    assert (*PRESETS, *METHODS) == WAYS


@pytest.mark.parametrize("way", WAYS)
def test_every_way_keeps_the_share_over_a_run(kontext: Any, way: str) -> None:
    config = edit(way=way, share=0.4).config(kontext, 8)
    found = sra.estimate(kontext, config, references=[(1024, 1024)], steps=8)
    if way in CHOSEN_PRESETS:
        assert (found.kinds.count("dense"), found.mean_tokens) == ({"fast": 1}.get(way, 2), 4096)  # no matter the share
    elif way in ("cache", "tiles"):
        assert sum(kind in ("dense", "profile") for kind in found.kinds) == 3  # 40 % of 8 steps
    else:
        assert found.mean_tokens / 4096 == pytest.approx(0.4, abs=0.01)


def test_execution_and_refresh_reach_the_configuration(kontext: Any) -> None:
    config = edit(way="edges", share=0.5, execute="cache", refresh="never").config(kontext, 4)
    assert isinstance(config.execute, Cache)
    assert config.refresh == Never()
    assert edit(way="recast", share=0.5, execute="Both", refresh="25%").config(kontext, 8).refresh == Every(0.25)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"images": ()}, "there must be a photo, got none"),
        ({"prompt": "  "}, "there must be a prompt"),
        ({"way": "edgs"}, "did you mean 'edges'"),
        ({"share": 0.0}, "the share must lie above 0 and up to 100 %, got 0 %"),
        ({"steps": 0}, "there must be at least one step, got 0"),
        ({"seed": -1}, "the seed must be a whole number"),
        ({"execute": "cash"}, "the execution must be one of tokens, cache, both, got 'cash'; did you mean 'cache'"),
        ({"refresh": "often"}, "the refresh is not clear: must be steps"),
    ],
)
def test_what_is_out_of_range_is_told_before_anything_is_loaded(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Edit(**{"images": ("photo.png",), "prompt": "a cup"} | settings)


def test_a_share_that_the_dense_step_alone_takes_is_refused(kontext: Any) -> None:
    with pytest.raises(ConfigError, match="more steps, a larger share"):
        edit(way="recast", share=0.1).config(kontext, 4)

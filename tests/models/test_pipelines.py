"""What is known of a pipeline is known of what derives from it, and of nothing else that has its name."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.classes import load_class
from sparse_ref_attn.batching.arguments import item_arguments
from sparse_ref_attn.errors import ConfigError, UnsupportedModelError
from sparse_ref_attn.eval.checked_arguments import call_arguments, check_class
from sparse_ref_attn.eval.meta_model import pipeline_of
from sparse_ref_attn.models import edit_pipelines, facts_of
from sparse_ref_attn.models.registry import families, register_adapter
from sparse_ref_attn.training.batches import training_of
from tests.pictures import picture
from tests.pipelines import CASES

FACTS = [facts for family in families() for facts in family.pipelines]
PAIR = [picture(16, 16, 0), picture(16, 16, 1)]


def stand_in(cls: type, **more: Any) -> Any:
    """An instance that nothing was loaded for."""
    pipe = object.__new__(cls)
    vars(pipe).update(more)
    return pipe


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: facts.name)
def test_every_class_is_where_its_facts_say(facts: Any) -> None:
    cls = load_class(facts.cls)
    assert facts_of(stand_in(cls)) is facts
    assert facts_of(stand_in(type(facts.name, (), {"__module__": "diffusers.pipelines.moved"}))) is facts
    assert facts_of(stand_in(type("Mine", (cls,), {}))) is facts
    assert facts_of(stand_in(type("Mine", (type("Between", (cls,), {}),), {}))) is facts
    if facts.area is not None:
        assert facts.area in inspect.signature(cls.__call__).parameters
    if facts.edits:
        assert facts.steps() >= 4


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: facts.name)
def test_a_class_of_the_same_name_elsewhere_is_not_it(facts: Any) -> None:
    namesake = stand_in(type(facts.name, (), {}))
    assert facts_of(namesake) is None
    assert facts_of(stand_in(type(facts.name, (), {"__module__": "diffusers_of_mine"}))) is None
    with pytest.raises(UnsupportedModelError, match="the pipeline must be one of FluxKontextPipeline, "):
        check_class(namesake)
    assert len(item_arguments(namesake, ["a cup"], [PAIR], None, None, {})[0]["image"]) == 2


def test_what_derives_from_kontext_takes_one_reference_everywhere() -> None:
    pipe = CASES["kontext"].build()
    pipe.__class__ = type("Tuned", (type(pipe),), {})
    with pytest.raises(ConfigError, match="Tuned takes at most 1 reference an item, got 2 for item 0"):
        item_arguments(pipe, ["a cup"], [PAIR], None, None, {})
    with pytest.raises(ConfigError, match="FluxKontextPipeline takes one reference image, got 2"):
        sra.estimate(pipe, references=[(32, 32)] * 2)
    with pytest.raises(ConfigError, match="FluxKontextPipeline takes one reference image, got 2"):
        call_arguments(pipe, PAIR, "a cup")
    assert call_arguments(pipe, PAIR[:1], "a cup", size=(32, 48))["max_area"] == 32 * 48
    assert training_of(pipe) is training_of(CASES["kontext"].build())


def test_what_nothing_says_how_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="train needs a FluxKontextPipeline or LongCatImageEditPipeline, got"):
        training_of(stand_in(diffusers.Flux2KleinPipeline))


def test_another_adapter_for_the_class_leaves_its_pipelines_known() -> None:
    family = next(family for family in families() if family.published.keys() == {"kontext"})
    other = sra.PlainAdapter("hidden_states", lambda kwargs: None)
    try:
        register_adapter(family.classes[0], other)
        assert edit_pipelines()[0].name == "FluxKontextPipeline"
        assert pipeline_of("kontext")[0] is family.pipelines[0]
    finally:
        register_adapter(family.classes[0], family)


def test_a_saved_pipeline_is_known_by_the_class_that_it_names(tmp_path: Any) -> None:
    index = tmp_path / "model_index.json"
    for text, name, distilled in (
        ('{"_class_name": "Flux2KleinPipeline", "is_distilled": true}', "Flux2KleinPipeline", True),
        ('{"_class_name": "Flux2KleinKVPipeline"}', "Flux2KleinKVPipeline", True),
        ('{"_class_name": "QwenImageEditPipeline"}', "QwenImageEditPipeline", False),
    ):
        index.write_text(text)
        facts, fast = pipeline_of(str(tmp_path))
        assert facts is not None
        assert (facts.name, fast) == (name, distilled)
    for text in ('{"_class_name": "FluxKontextInpaintPipeline"}', '{"_class_name": ["own.py", "FluxKontextPipeline"]}'):
        index.write_text(text)
        assert pipeline_of(str(tmp_path)) == (None, False)

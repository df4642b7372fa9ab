"""The published pipelines that edit reference images, found by class."""

from __future__ import annotations

from typing import Any

from ..adapters.pipeline_facts import PipelineFacts
from .registry import families

__all__ = ["edit_facts", "edit_facts_named", "edit_pipelines", "facts_of"]


def facts_of(pipe: Any) -> PipelineFacts | None:
    """What is known of the published class that a pipeline is, or derives from; None of any other.

    A class of somebody's own is known by what it derives from, never by its name.

    Examples
    --------
    >>> class FluxKontextPipeline: ...
    >>> facts_of(FluxKontextPipeline()) is None
    True
    """
    known = _known()
    return next((facts for cls in type(pipe).__mro__ for facts in known if facts.describes(cls)), None)


def edit_pipelines() -> list[PipelineFacts]:
    """Those whose call is a prompt and references alone."""
    return [facts for facts in _known() if facts.edits]


def edit_facts(pipe: Any) -> PipelineFacts | None:
    """As `facts_of`, of those whose call is a prompt and references alone."""
    facts = facts_of(pipe)
    return facts if facts is not None and facts.edits else None


def edit_facts_named(name: object) -> PipelineFacts | None:
    """As `edit_facts`, of the class of diffusers that a saved pipeline names in its ``model_index.json``.

    Examples
    --------
    >>> edit_facts_named("FluxKontextPipeline").several, edit_facts_named("Flux2KleinPipeline").several
    (False, True)
    """
    return next((facts for facts in edit_pipelines() if facts.name == name), None)


def _known() -> list[PipelineFacts]:
    return [facts for family in families() for facts in family.pipelines]

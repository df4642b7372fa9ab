"""A published model's size: where it differs from its class's defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .pipeline_facts import PipelineFacts

__all__ = ["PublishedSize"]


@dataclass(frozen=True)
class PublishedSize:
    """One published model of a family, without its weights.

    Parameters
    ----------
    pipeline : PipelineFacts
        The pipeline that it is published with.
    billions : float
        Of its parameters.
    config : mapping
        Fields of the config of the family's first class that are not its defaults.
    distilled : bool
        Whether it is distilled to few steps.
    prepare : callable, optional
        Does to a fresh transformer what its pipeline does.
    assumed : bool
        Whether no published configuration is known, and the size is that of the class's defaults.
    """

    pipeline: PipelineFacts
    billions: float
    config: Mapping[str, Any] = field(default_factory=dict)
    distilled: bool = False
    prepare: Callable[[nn.Module], None] | None = None
    assumed: bool = False

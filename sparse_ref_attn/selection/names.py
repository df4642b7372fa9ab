"""Selectors by name, and to and from JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..vocabulary import TRAINED, chosen
from .attention import AttentionMass, SelfAttention
from .base import FromFunction, Selector
from .combine import Mix, Union
from .edges import Edges
from .learned import Learned
from .masks import Boxes, SubjectMask
from .saliency import Saliency
from .saved_ranking import SavedRanking
from .similarity import Cosine
from .uniform import Grid, Random

__all__ = ["NAMES", "from_dict", "selector", "to_dict"]

NAMES: Mapping[str, type[Selector]] = {
    "random": Random,
    "grid": Grid,
    "edges": Edges,
    "saliency": Saliency,
    "cosine": Cosine,
    "self-attention": SelfAttention,
    "mass": AttentionMass,
    "learned": Learned,
}
_KINDS: Mapping[str, type[Selector]] = {**NAMES, "boxes": Boxes, "mix": Mix, "union": Union}
_NO_JSON: Mapping[type[Selector], str] = {
    FromFunction: "it holds a function",
    SubjectMask: "it holds a mask's pixels; boxes do travel",
    SavedRanking: "it holds a run's scores: save the ranking and keep its path",
}


def selector(choice: str | Selector) -> Selector:
    """A selector from its name, with default settings, or `Learned` from a ``.safetensors`` file; a selector is
    returned as it is.

    Raises
    ------
    ConfigError
        For an unknown name or another type, and as `Learned.load`.

    Examples
    --------
    >>> selector("edges")
    Edges(sigma=2.0, low=0.2, high=0.4, on_latents='error')
    """
    if isinstance(choice, Selector):
        return choice
    if not isinstance(choice, str):
        raise ConfigError(f"a selector must be a Selector or one of {', '.join(NAMES)}, got {choice!r}")
    if choice.endswith(TRAINED):
        return Learned.load(choice)
    return NAMES[chosen("a selector's name", choice, NAMES)]()


def to_dict(choice: Selector) -> dict[str, Any]:
    """A selector as JSON types: its kind and its fields.

    Raises
    ------
    ConfigError
        For a selector that holds data or code, or that is not one of the library's.

    Examples
    --------
    >>> to_dict(Cosine())
    {'kind': 'cosine', 'sign': 'distinct'}
    """
    for kind, cls in _KINDS.items():
        if type(choice) is cls:
            assert dataclasses.is_dataclass(choice)
            return {"kind": kind, **{f.name: _plain(getattr(choice, f.name)) for f in dataclasses.fields(choice)}}
    reason = _NO_JSON.get(type(choice), "it is not one of the library's own")
    raise ConfigError(f"a selector must be plain settings to travel to JSON, got {type(choice).__name__}: {reason}")


def from_dict(data: Mapping[str, Any]) -> Selector:
    """The selector that `to_dict` described.

    Raises
    ------
    ConfigError
        For an unknown kind, missing or unknown fields, or values out of range.

    Examples
    --------
    >>> from_dict({"kind": "union", "selectors": [{"kind": "edges"}, {"kind": "grid"}]}).selectors[1]
    Grid()
    """
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"a selector's dict must have a kind among {', '.join(map(repr, _KINDS))}, got {data!r}")
    cls = _KINDS[kind]
    assert dataclasses.is_dataclass(cls)
    fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
    given = {name: value for name, value in data.items() if name != "kind"}
    required = {name for name, needed in fields.items() if needed}
    if not required <= given.keys() <= fields.keys():
        raise ConfigError(f"{kind!r} must have fields among {list(fields)}, got {list(given)}")
    made = cls(**{name: _rich(value) for name, value in given.items()})
    assert isinstance(made, Selector)
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, Selector):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _rich(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_dict(value)
    return tuple(_rich(item) for item in value) if isinstance(value, (tuple, list)) else value

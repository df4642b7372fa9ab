"""The model families: one file or folder each, in which all that is known of the family stands.

A family is a line of `vocabulary.FAMILIES` and a module here whose ``FAMILY`` is its `Adapter`.
"""

from importlib import import_module

from ..vocabulary import FAMILIES
from .codebases import CODEBASES
from .named_models import MODELS, named_model, published_size
from .pipelines import edit_facts, edit_facts_named, edit_pipelines, facts_of
from .registry import adapter_for, register_adapter, register_family, supported

__all__ = [
    "MODELS",
    "adapter_for",
    "edit_facts",
    "edit_facts_named",
    "edit_pipelines",
    "facts_of",
    "named_model",
    "published_size",
    "register_adapter",
    "register_family",
    "supported",
]

for _name in FAMILIES:
    register_family(import_module(f"{__name__}.{_name}").FAMILY)

for _name, _served in CODEBASES.items():
    register_adapter(_name, import_module(f"{__name__}.{_served}").FAMILY if isinstance(_served, str) else _served)

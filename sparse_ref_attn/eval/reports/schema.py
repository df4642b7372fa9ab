"""The documents' JSON schema, which ships, and what a document breaks of it, in words.

It is read here without a package for it. A test holds that no keyword of the schema is unknown here, and that the
``jsonschema`` package says the same of documents right and wrong.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from ... import __version__
from ...checks import is_int, is_number
from ...errors import ConfigError

__all__ = ["KEYWORDS", "NAME", "VERSION", "broken", "check", "schema"]

NAME = "sparse_ref_attn.report"
VERSION = 1
"""Of the documents that this library writes, and the newest that it reads."""
KEYWORDS = frozenset(
    (
        "$ref", "additionalProperties", "anyOf", "const", "exclusiveMinimum", "items", "minItems", "minimum", "pattern",
        "properties", "required", "type",
    )
)  # fmt: skip
"""Of the schema that constrain; the others only tell."""


@cache
def schema() -> dict[str, Any]:
    """The schema as JSON types.

    Examples
    --------
    >>> schema()["properties"]["schema"]["const"] == NAME
    True
    """
    file = importlib.resources.files("sparse_ref_attn") / "assets" / "report.schema.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def check(document: Any, name: str) -> None:
    """Raise ConfigError where a document is none of these, or a newer one than this library knows.

    Parameters
    ----------
    document : object
        JSON types.
    name : str
        Of the document, for the error.

    Raises
    ------
    ConfigError

    Examples
    --------
    >>> check({"schema": NAME, "version": 9}, "theirs.json")
    Traceback (most recent call last):
    sparse_ref_attn.errors.ConfigError: a report's version must be at most 1, got 9 in theirs.json: ...
    """
    if not isinstance(document, dict) or document.get("schema") != NAME:
        raise ConfigError(
            f"a report must be a file of sra demo, sra compare or sra compare --share, got {name}, which does not say "
            f'"schema": "{NAME}"'
        )
    version = document.get("version")
    if is_int(version, VERSION + 1):
        raise ConfigError(
            f"a report's version must be at most {VERSION}, got {version} in {name}: it was written by a newer "
            f"sparse-ref-attn than {__version__}, which is needed to read it"
        )
    for words in broken(document, schema(), ""):
        raise ConfigError(f"a report must fit its schema, got {name}, in which {words}")


def broken(value: Any, rule: Mapping[str, Any], where: str) -> Iterator[str]:
    """Each thing that `value` breaks of a schema's `rule`, in words; `where` is its own place."""
    if "$ref" in rule:
        yield from broken(value, schema()["$defs"][rule["$ref"].removeprefix("#/$defs/")], where)
    if "anyOf" in rule:
        found = [list(broken(value, each, where)) for each in rule["anyOf"]]
        if all(found):
            yield found[-1][0]
    if "const" in rule and value != rule["const"]:
        yield f"{_place(where)} must be {rule['const']!r}, got {value!r:.80}"
    kinds = rule.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds and not any(_TYPES[kind](value) for kind in kinds):
        yield f"{_place(where)} must be {' or '.join(_WORDS[kind] for kind in kinds)}, got {value!r:.80}"
        return
    if isinstance(value, dict):
        yield from _fields(value, rule, where)
    elif isinstance(value, list):
        if len(value) < rule.get("minItems", 0):
            yield f"{_place(where)} must have at least {rule['minItems']} entries, got {len(value)}"
        for i, each in enumerate(value):
            yield from broken(each, rule.get("items", {}), f"{where}[{i}]")
    elif isinstance(value, str):
        if "pattern" in rule and not re.search(rule["pattern"], value):
            yield f"{_place(where)} must fit {rule['pattern']}, got {value!r:.80}"
    elif _TYPES["number"](value):
        if value < rule.get("minimum", value):
            yield f"{_place(where)} must be at least {rule['minimum']}, got {value!r}"
        if "exclusiveMinimum" in rule and value <= rule["exclusiveMinimum"]:
            yield f"{_place(where)} must be above {rule['exclusiveMinimum']}, got {value!r}"


def _fields(value: Mapping[str, Any], rule: Mapping[str, Any], where: str) -> Iterator[str]:
    for name in rule.get("required", ()):
        if name not in value:
            yield f"{_place(where)} must have {name!r}, got {', '.join(map(repr, value)) or 'nothing'}"
    known, further = rule.get("properties", {}), rule.get("additionalProperties", {})
    for name, each in value.items():
        yield from broken(each, known.get(name, further), f"{where}.{name}" if where else name)


def _place(where: str) -> str:
    return where or "it"


_WORDS = {
    "object": "an object",
    "array": "an array",
    "string": "a string",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "null": "null",
}
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "number": lambda value: is_number(value) and math.isfinite(value),
    "integer": lambda value: _TYPES["number"](value) and value == int(value),
    "null": lambda value: value is None,
}

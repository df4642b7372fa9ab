"""How the values of arguments are read; each error is a line that says what must hold."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .. import refresh as refreshing
from ..checks import is_int
from ..errors import ConfigError
from ..isolation import PERS, Isolation
from ..refresh import Refresh
from ..vocabulary import SELECTORS, TRAINED, chosen

__all__ = [
    "above",
    "at_least_one",
    "at_least_zero",
    "blocks",
    "factors",
    "isolated",
    "keep",
    "lora",
    "named",
    "one_of",
    "port",
    "refresh",
    "seed",
    "selector",
    "setting",
    "share",
    "shares",
    "size",
    "typed",
]


def one_of(choices: Iterable[str], same: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Arguments of ``add_argument`` for a setting with these names: its type, and its metavar where they are few."""
    choices = tuple(choices)

    def read(text: str) -> str:
        try:
            return chosen("", text, choices, same)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).strip()) from None

    return {"type": read, "metavar": "{" + ",".join(choices) + "}"}


def keep(text: str) -> float | int:
    """ "0.25" and "25%" are shares, "256" is a number of tokens."""
    try:
        found: float | int = float(text[:-1]) / 100 if text.endswith("%") else _number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a share (0.25, 25%) or a number of tokens (256), got {text!r}"
        ) from None
    if is_int(found) and found == 1:
        raise argparse.ArgumentTypeError("1 means one token or all of them: write 100% to keep all, got '1'")
    return found


def _number(text: str) -> float | int:
    return int(text) if text.isdecimal() else float(text)


def share(text: str) -> float:
    """A share in (0, 1]."""
    found = keep(text)
    if is_int(found) or not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"must be a share in (0, 1] such as 0.25 or 25%, got {text!r}")
    return found


def shares(text: str) -> tuple[float, float]:
    """ "5%-100%": the lowest and the highest, or one share as both; a bare 1 is all."""
    low, _, high = text.partition("-")
    try:
        return tuple(share("100%" if end == "1" else end) for end in (low, high or low))  # type: ignore[return-value]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be a share or two of them (5%-100%, 0.05-1), got {text!r}") from None


def above(least: int) -> Callable[[str], int]:
    """Whole numbers of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return number


def at_least_one(text: str) -> float:
    """A finite number of at least 1; "2.5x" is 2.5."""
    try:
        found = float(text.removesuffix("x"))
    except ValueError:
        found = math.nan
    if not 1 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return found


def at_least_zero(text: str) -> float:
    """A finite number of at least 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return found


def refresh(text: str) -> Refresh:
    """As `refresh.named`."""
    try:
        return refreshing.named(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seed(text: str) -> int:
    """What torch's generators take."""
    if not text.isdecimal() or not int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2**64), got {text!r}")
    return int(text)


def port(text: str) -> int:
    """What a server may listen on."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 65535, got {text!r}")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, got {text!r}")
    return int(width), int(height)


def selector(text: str) -> str:
    """A selector's name, or the file of a trained one."""
    name: str = text if text.endswith(TRAINED) else one_of(SELECTORS)["type"](text)
    return name


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value JSON or a string."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def named(text: str) -> tuple[str, str]:
    """NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (equals and name and path):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, path


def lora(text: str) -> tuple[str, float]:
    """PATH or PATH:SCALE."""
    path, colon, scale = text.rpartition(":")
    try:
        found = (path, float(scale)) if colon else (text, 1.0)
    except ValueError:
        found = text, 1.0  # a colon of the path's own
    if not (found[0] and math.isfinite(found[1])):
        raise argparse.ArgumentTypeError(f"must be PATH or PATH:SCALE, such as lora.safetensors:0.8, got {text!r}")
    return found


def isolated(text: str) -> Isolation:
    """Who sees whom of references that run by themselves."""
    try:
        return Isolation(text)
    except ConfigError:
        raise argparse.ArgumentTypeError(f"must be {' or '.join(PERS)}, got {text!r}") from None


def factors(text: str) -> tuple[float, ...]:
    """Numbers with commas between."""
    try:
        return tuple(float(factor) for factor in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be factors in (0, 1], one a layer, such as 1,0.5,0.5; got {text!r}"
        ) from None


def blocks(text: str) -> str | tuple[int, ...]:
    """ "single", "double" or "all", or the blocks' numbers with commas between."""
    if text in ("single", "double", "all"):
        return text
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"must be single, double, all or blocks' numbers such as 2,4; got {text!r}")
    return tuple(int(number) for number in numbers)


def typed(options: argparse.Namespace) -> str:
    """What was asked for, for the records of a run: each argument by its name."""
    told = (f"{name}={value}" for name, value in vars(options).items() if value is not None)
    return shlex.join(word for word in told if not word.startswith(("run=", "parser=")))

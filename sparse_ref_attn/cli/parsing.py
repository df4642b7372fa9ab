"""The parser: errors of one line, near misses named, and commands whose code is imported when one runs."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ConfigError
from ..extras import missing
from ..vocabulary import near

__all__ = ["Commands", "Parser", "later"]


class Parser(argparse.ArgumentParser):
    """Its errors are the library's: one line, no usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(action.choices)
            raise argparse.ArgumentError(
                action, f"must be one of {', '.join(map(str, choices))}, got {value!r}{near(value, choices)}"
            )

    def parse(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """As ``parse_args``, with the near misses of an unknown argument; images may stand apart."""
        options, unknown = self.parse_known_args(args)
        if unknown and "images" in options and not any(word.startswith("-") for word in unknown):
            options.images += unknown  # those behind an option: sra run a.png -p TEXT b.png
        elif unknown:
            parser = getattr(options, "parser", self)
            known = re.findall(r"--[a-z][a-z-]+", parser.format_help())
            parser.error(f"arguments must be known, got {' '.join(unknown)}{near(unknown[0].partition('=')[0], known)}")
        return options


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]
else:
    Commands = Any
"""What a command adds its own parser to."""


def later(module: str, name: str, *extras: str) -> Callable[[argparse.Namespace], int | None]:
    """What runs a command: a function of a module of this package, imported when it is called.

    Parameters
    ----------
    module, name : str
    *extras : "diffusers", "eval", "train" or "app"
        Without whose packages the command is refused before anything else.
    """

    def call(options: argparse.Namespace) -> int | None:
        if why := missing(*extras):
            raise ConfigError(f"{options.parser.prog} cannot run: {why}")
        found: int | None = getattr(importlib.import_module(f".{module}", __package__), name)(options)
        return found

    return call

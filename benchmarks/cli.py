"""The benchmarks as one command: ``python -m benchmarks LEVEL``, or ``sra bench LEVEL`` in a checkout.

Each level says its own arguments: ``python -m benchmarks LEVEL --help``.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import torch

from sparse_ref_attn.errors import ConfigError

__all__ = ["LEVELS", "main"]

LEVELS = {
    "ops": ("bench_ops", "attention and its score alone, beside what one would write or install instead"),
    "steps": ("bench_steps", "one transformer call, and one of its blocks"),
    "host": ("bench_host", "what the library itself costs the CPU in a step"),
    "pipeline": ("bench_pipeline", "whole pipe() calls by every method; suites of cases, the real size among them"),
    "batch": ("bench_batch", "items with references of their own: one by one, as one batch, padded"),
    "configurations": ("configurations", "what the compiler makes of the Triton kernels' tables; needs no card"),
    "tune": ("tune", "every candidate configuration of the Triton kernels, on a card"),
    "check": ("check", "has anything got slower: CSV files of fresh rows beside the committed ones"),
    "plots": ("plots", "pictures of the rows"),
    "card": ("card", "all of it on a card, in parts of at most eight minutes"),
}
"""Name -> the module that has its `add_arguments`, and one line about it."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Run one level.

    Parameters
    ----------
    arguments : sequence of str, optional
        After the program's name; default those of this process.
    prog : str
        The program's name in help and errors.

    Returns
    -------
    int
        0, or 1 where a check or a part failed.

    Raises
    ------
    ConfigError
        If the level needs a package that is not installed.
    """
    told = "\n".join(f"  {name:<15} {about}" for name, (_, about) in LEVELS.items())
    top = argparse.ArgumentParser(prog=prog, description=f"{__doc__}\n{told}", add_help=True)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.add_argument("level", choices=LEVELS, metavar="LEVEL")
    top.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the level's own arguments")
    asked = top.parse_args(arguments)
    try:
        module = importlib.import_module(f".{LEVELS[asked.level][0]}", __package__)
    except ImportError as error:
        raise ConfigError(f"{prog} {asked.level} needs the package {error.name}, which is not installed") from error
    level = argparse.ArgumentParser(prog=f"{prog} {asked.level}", description=module.__doc__)
    level.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(level)
    options = level.parse_args(asked.rest)
    with torch.no_grad():
        return int(options.run(options))

"""The whole command line: every command and its arguments; nothing of what they run is imported for them."""

from __future__ import annotations

from .. import __version__
from .commands import app, bench, build, compare, demo, doctor, estimate, evaluate, run, shared, train
from .failures import CODES
from .parsing import Parser

__all__ = ["parser"]

COMMANDS = (demo, run, compare, shared, evaluate, train, app, estimate, build, bench, doctor)
"""In the order of ``sra --help``."""


def parser() -> Parser:
    """The whole command line; parsed options have `run`, the command to call with them."""
    top = Parser(
        prog="sra",
        description="Runs reference-conditioned diffusion transformers on the reference tokens that matter.",
        epilog="Exit codes: " + "; ".join(f"{code} {words}" for code, words in CODES.items()) + ".",
    )
    top.add_argument("--version", action="version", version=f"sparse_ref_attn {__version__}")
    top.add_argument("--traceback", action="store_true", help="where an error comes from, in place of one line")
    top.set_defaults(run=None)
    kinds = top.add_subparsers(metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(kinds)
    return top

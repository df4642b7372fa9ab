"""The arguments of ``sra bench``."""

from __future__ import annotations

from ..parsing import Commands, later

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="measure it: ops, steps, whole pipelines, beside rivals and bounds (in a checkout of the repository)",
        add_help=False,
        prefix_chars="\0",  # every word, --help too, is the benchmarks' own
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=later("benching", "bench"))

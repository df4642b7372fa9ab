"""The arguments of ``sra shared``."""

from __future__ import annotations

from ..parsing import Commands, later

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "shared",
        help="what others measured: files of sra compare --share, as one table and one picture",
        description="Reads files that sra compare --share wrote, on this machine or others, checks each against the "
        "schema, and writes a table of every run (CSV, markdown) and a picture of likeness over speed-up.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, or a folder of .json files")
    parser.add_argument("--out", metavar="DIR", help="where table and picture go (default: the table is printed alone)")
    parser.add_argument("--metric", metavar="NAME", help="what the picture shows (default: the files' first, PSNR)")
    parser.set_defaults(run=later("sharing", "shared"))

"""The arguments of ``sra app``."""

from __future__ import annotations

from .. import values
from ..common import add_offload, add_place, add_set
from ..parsing import Commands, later

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "app",
        help="a page in the browser: photos and a prompt in, the edited picture out",
        description="Serves a page on this machine that edits photos, shows which tokens were read, and runs the same "
        "with every token beside it. One model in memory, one run at a time; nothing is sent anywhere.",
    )
    parser.add_argument(
        "--model", metavar="PATH", help="directory of save_pretrained, or a hub id (default: the small trained one)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine alone)")
    parser.add_argument("--port", type=values.port, metavar="N", help="default: the first that is free from 7860 on")
    add_place(parser)
    add_offload(parser)
    add_set(parser)
    parser.set_defaults(run=later("serving", "app", "diffusers", "app"))

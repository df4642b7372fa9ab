"""The arguments of ``sra estimate``."""

from __future__ import annotations

from ... import vocabulary
from .. import values
from ..common import STEPS, add_config, add_speedup
from ..parsing import Commands, later

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "estimate",
        help="tokens, work and memory of a run, without running it",
        description="Tokens, FLOPs and memory of a run from sizes alone; needs no weights.",
    )
    parser.add_argument("--model", required=True, help=f"{', '.join(vocabulary.MODELS)}, or a pipeline's directory")
    parser.add_argument(
        "--references", type=values.above(1), default=1, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--reference-size",
        "--size",
        type=values.size,
        default=(1024, 1024),
        metavar="WxH",
        help="of each (default: 1024x1024)",
    )
    parser.add_argument(
        "--output", type=values.size, default=(1024, 1024), metavar="WxH", help="in pixels (default: 1024x1024)"
    )
    parser.add_argument("--text-tokens", type=values.above(0), default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=values.above(1), help=STEPS)
    add_config(parser)
    add_speedup(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=later("estimating", "estimate", "diffusers"))

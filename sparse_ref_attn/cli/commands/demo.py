"""The arguments of ``sra demo``."""

from __future__ import annotations

from .. import values
from ..common import DEFAULT, add_builtin, add_config, add_runs
from ..parsing import Commands, later

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="dense and sparse side by side, offline, on a small trained model",
        description="Builds a FLUX.1 Kontext pipeline (diffusers' own classes), runs it dense and sparse, and reports "
        "times, tokens and bound. The small one is trained: it puts subjects that it never saw where the prompt says.",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where pictures and report.json go")
    parser.add_argument(
        "--image", metavar="PATH", help="photo: the reference, or what the small model's subjects stand on"
    )
    parser.add_argument("--prompt", help="with --builtin large or tiny")
    parser.add_argument("--steps", type=values.above(1), help="denoising steps (default: 12; random weights: 8)")
    add_builtin(parser)
    add_config(
        parser,
        "25%%; recast after its dense step: a quarter, with random weights 1/16 to 1/4, rising; the others keep all",
        f"{DEFAULT}; random weights: sparse-context",
    )
    add_runs(parser)
    parser.set_defaults(run=later("demonstrating", "demo", "diffusers"))

"""The arguments of ``sra compare``."""

from __future__ import annotations

from ... import vocabulary
from .. import execution, values
from ..common import STEPS, add_builtin, add_likeness, add_offload, add_place, add_runs, add_set
from ..parsing import Commands, later

__all__ = ["add"]


OTHERS = ("learned", *vocabulary.STEP_CACHES, *vocabulary.COMBINED)
"""Beside the methods: a rule that was trained for one model, and rivals. Fewer steps are always there."""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="many ways to spend the same tokens, side by side in one page",
        description="Runs one pipeline dense and with each method at the same share of the tokens, same seed, in "
        "turns, then dense in as many fewer steps as take no longer than each, and writes an HTML page with pictures, "
        "kept tokens, metrics against the dense picture, times and bounds; also CSV, JSON and markdown. --profile and "
        "--rerank-every reach the methods that measure attention.",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="directory of save_pretrained, or a hub id (default: the small trained one)",
    )
    parser.add_argument("--image", action="append", metavar="PATH", help="reference; repeat for several")
    parser.add_argument("--prompt")
    parser.add_argument("--out", required=True, metavar="DIR", help="where pictures and numbers go")
    parser.add_argument("--output", type=values.size, metavar="WxH", help="size in pixels (default: the pipeline's)")
    parser.add_argument("--height", type=values.above(16), metavar="H", help="the same as --output, with --width")
    parser.add_argument("--width", type=values.above(16), metavar="W")
    parser.add_argument("--steps", type=values.above(1), help=STEPS)
    add_place(parser)
    add_offload(parser)
    add_set(parser)
    parser.add_argument(
        "--keep", type=values.share, default=0.25, metavar="R", help="mean share over all steps (default: 25%%)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        **values.one_of((*vocabulary.METHODS, *OTHERS), vocabulary.SAME) | {"metavar": "NAME"},
        default=[*vocabulary.METHODS, "TaylorSeer", "FirstBlockCache"],
        help=f"{', '.join(vocabulary.METHODS)}; beside them {', '.join(OTHERS)} (default: the first, TaylorSeer and "
        "FirstBlockCache)",
    )
    share = parser.add_argument_group("what is given away", "docs/sharing.md says what the file holds")
    share.add_argument(
        "--share",
        metavar="FILE",
        help="write all numbers and settings to a .json file, without prompt, pictures or paths",
    )
    share.add_argument(
        "--share-pictures", action="store_true", help="put the prompt, the references and every picture into it too"
    )
    add_builtin(parser)
    add_likeness(parser, "CLIP-I")
    execution.add_arguments(parser)
    add_runs(parser)
    parser.set_defaults(run=later("comparing", "compare", "diffusers", "eval"))

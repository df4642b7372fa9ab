"""The arguments of ``sra eval``."""

from __future__ import annotations

from ... import vocabulary
from .. import values
from ..common import add_likeness, add_place, add_set
from ..parsing import Commands, later

__all__ = ["add"]

OTHERS = (*vocabulary.RIVALS, *vocabulary.COMBINED)
"""What saves work and leaves the references alone, and both together."""
KEEPS = (1.0, 0.5, 0.25, 0.15, 0.1, 0.05)


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "eval",
        help="models, rules and shares over a data set: rows, intervals, plots",
        description="Makes pictures dense and with each rule at each share of the tokens, scores them against the "
        "dense ones and the answers, and appends a row for each. A run that was stopped goes on; several processes "
        "share the work under accelerate launch or torchrun.",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="rows.csv and what is made of it; runs add to it")
    parser.add_argument(
        "--models",
        nargs="+",
        type=values.named,
        metavar="NAME=PATH",
        help="pipelines, or transformer folders of sra train, which go into the small pipeline (default: its own)",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="a data set on disk (default: the procedural task, held-out part)")
    data.add_argument(
        "--layout", **values.one_of(vocabulary.LAYOUTS), default="folder", help="how it lies there (default: folder)"
    )
    data.add_argument("--sprites", metavar="DIR", help="subjects of the procedural task (default: those that ship)")
    part = parser.add_argument_group("part of the grid")
    part.add_argument(
        "--rules",
        nargs="+",
        **values.one_of((*vocabulary.RULES, *OTHERS), vocabulary.SAME) | {"metavar": "RULE"},
        help=f"{', '.join(vocabulary.RULES)} (default: all of these and {vocabulary.FEWER}; learned, which "
        f"fits the small model alone, without --models); {', '.join(OTHERS)}: "
        "--keep is then the share of the steps",
    )
    part.add_argument(
        "--schedules",
        nargs="+",
        **values.one_of(vocabulary.SCHEDULES) | {"metavar": "S"},
        default=["flat"],
        help=", ".join(vocabulary.SCHEDULES),
    )
    part.add_argument("--keep", nargs="+", type=values.share, metavar="R", help="default: 100 to 5 %%")
    part.add_argument(
        "--mean-over",
        **values.one_of(("run", "dropping")),
        default="run",
        help="--keep is the mean share over the whole run, a dense step included, or over the steps that drop tokens "
        "(default: run)",
    )
    part.add_argument(
        "--families",
        nargs="+",
        metavar="F",
        help="kinds of example (default: all; of the procedural task, those that the models were trained on)",
    )
    part.add_argument("--subjects", type=values.above(1), metavar="N", help="examples of each family (default: all)")
    part.add_argument(
        "--seeds", type=values.above(1), default=1, metavar="K", help="noises of each (default: %(default)s)"
    )
    swept = parser.add_argument_group("the frontier")
    swept.add_argument(
        "--frontier",
        action="store_true",
        help="instead of the grid: every candidate for presets and plans, in all steps and in fewer, and step caches; "
        "half of them at a time on twice as many examples; writes frontier.csv, a table and figures over the work of "
        "published models",
    )
    swept.add_argument("--candidates", nargs="+", metavar="KEY", help="part of the list (default: all)")
    swept.add_argument(
        "--first", type=values.above(1), metavar="N", help="examples of each family that all run on (default: 8)"
    )
    how = parser.add_argument_group("settings, the same for all runs of a folder")
    how.add_argument("--steps", type=values.above(1), help="denoising steps (default: 8, with --frontier 12)")
    how.add_argument(
        "--side", type=values.above(16), help="of the square output in pixels (default: 128 for the small pipeline)"
    )
    add_set(how, "of the pipeline's own call")
    how.add_argument(
        "--metrics",
        nargs="+",
        **values.one_of(vocabulary.METRICS) | {"metavar": "M"},
        help=f"{', '.join(vocabulary.METRICS)} (default: the first four, and the last two where scenery is left open)",
    )
    add_likeness(how, "CLIP-I and CLIP-T")
    how.add_argument("--auraface", metavar="PATH", help="folder of AuraFace: adds its similarity of faces")
    how.add_argument(
        "--rfid",
        action="store_true",
        help="distance of each method's kept pictures (--pictures, of which it needs many) from those of every token, "
        "as sets: rfid.csv",
    )
    add_place(parser, device="; the small pipeline: cpu")
    parser.add_argument(
        "--pictures",
        type=values.above(0),
        default=1,
        metavar="N",
        help="kept of each family (default: 1)",
    )
    parser.set_defaults(run=later("evaluating", "evaluate", "diffusers", "eval"))

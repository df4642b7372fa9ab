"""``sra eval``: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from .. import doctor
from ..errors import ConfigError
from ..eval import loading
from ..eval.methods import RULES, SCHEDULES, method_name
from ..toy.pipeline import TRAINED
from . import commands

__all__ = ["add_arguments", "evaluate"]

KEEPS = (1.0, 0.5, 0.25, 0.15, 0.1, 0.05)


def add_arguments(parser: argparse.ArgumentParser, above: Any, share: Any, setting: Any) -> None:
    """The arguments of ``sra eval``; `above`, `share` and `setting` parse numbers, shares and NAME=VALUE."""
    parser.add_argument("--out", required=True, metavar="DIR", help="rows.csv and what is made of it; runs add to it")
    parser.add_argument(
        "--models",
        nargs="+",
        type=_named,
        metavar="NAME=PATH",
        help="pipelines, or transformer folders of sra train, which go into the small pipeline (default: its own)",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="a data set on disk (default: the procedural task, held-out part)")
    data.add_argument("--layout", default="folder", help="folder, kontext-bench, dreambench++ or pie-bench")
    data.add_argument("--sprites", metavar="DIR", help="subjects of the procedural task (default: those that ship)")
    part = parser.add_argument_group("part of the grid")
    part.add_argument("--rules", nargs="+", metavar="RULE", help=f"{', '.join(RULES)} (default: all)")
    part.add_argument("--schedules", nargs="+", default=["flat"], metavar="S", help=f"{', '.join(SCHEDULES)}")
    part.add_argument("--keep", nargs="+", type=share, default=list(KEEPS), metavar="R", help="default: 100 to 5 %%")
    part.add_argument(
        "--mean-over",
        choices=("run", "dropping"),
        default="run",
        help="--keep is the mean share over the whole run, a dense step included, or over the steps that drop tokens "
        "(default: run)",
    )
    part.add_argument("--families", nargs="+", metavar="F", help="kinds of example (default: all)")
    part.add_argument("--subjects", type=above(1), metavar="N", help="examples of each family (default: all)")
    part.add_argument("--seeds", type=above(1), default=1, metavar="K", help="noises of each (default: %(default)s)")
    how = parser.add_argument_group("settings, the same for all runs of a folder")
    how.add_argument("--steps", type=above(1), default=8, help="denoising steps (default: %(default)s)")
    how.add_argument("--side", type=above(16), help="of the output in pixels (default: 128 for the small pipeline)")
    how.add_argument("--set", action="append", type=setting, metavar="NAME=VALUE", help="of the pipeline's own call")
    how.add_argument(
        "--metrics", nargs="+", metavar="M", help="psnr ssim subject-psnr identity (the default) lpips dists"
    )
    how.add_argument("--clip", metavar="PATH", help="folder of a CLIP model: adds CLIP-I and CLIP-T")
    how.add_argument("--dino", metavar="PATH", help="folder of a DINO or DINOv2 model: adds its similarity")
    parser.add_argument("--dtype", choices=loading.DTYPES, help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu; the small pipeline: cpu")
    parser.add_argument(
        "--pictures", type=above(0), default=1, metavar="N", help="keep the pictures of N examples of each family"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """What the command needs is only imported here."""
    commands.needs("eval", "diffusers", "eval")
    evaluate(options)


def evaluate(options: argparse.Namespace) -> None:
    """Make what is missing of the grid, then tables and plots of all rows."""
    from ..eval.calls import check_reserved
    from ..eval.datasets import load_examples
    from ..eval.evaluate import Grid
    from ..eval.evaluate import evaluate as run_grid
    from ..eval.examples import procedural
    from ..eval.models import EvalModel
    from ..eval.scores import Scorer
    from ..eval.tables import write_results

    if options.data is not None and options.sprites is not None:
        raise ConfigError("--sprites must come without --data, got both")
    if options.data is not None and options.models is None:
        raise ConfigError("--data must come with --models: the small model knows its own task alone, got none")
    given = [("small", TRAINED)] if options.models is None else options.models
    names = [name for name, _ in given]
    if len(set(names)) < len(names):
        raise ConfigError(f"models must have names of their own, got {', '.join(names)}")
    check_reserved(dict(options.set or ()))
    commands.quiet(pipelines_too=True)
    if options.data is None:
        data = procedural(options.sprites, side=128 if options.side is None else options.side)
    else:
        data = load_examples(options.data, options.layout)
    rules = [rule for rule in RULES if rule != "subject mask" or data.reference_masks]
    if options.rules is not None:
        rules = options.rules
        if "subject mask" in rules and not data.reference_masks:
            raise ConfigError('"subject mask" must have masks of the references, got a data set without any')
    methods = dict.fromkeys(method_name(rule, schedule) for schedule in options.schedules for rule in rules)
    grid = Grid(
        tuple(methods), tuple(options.keep), options.seeds,
        None if options.families is None else tuple(options.families), options.subjects, options.mean_over,
    )  # fmt: skip
    data.chosen(grid.families, grid.count)  # a family that is not there is told before anything is loaded
    scorer = Scorer(data, options.metrics, clip=options.clip, dino=options.dino)
    models = [
        EvalModel(
            name, path, side=options.side, steps=options.steps, device=options.device, dtype=options.dtype,
            more=dict(options.set or ()),
        )
        for name, path in given
    ]  # fmt: skip
    about = {
        "command": shlex.join(f"{k}={v}" for k, v in vars(options).items() if k != "run" and v is not None),
        "device": doctor.device(str(models[0].pipe.device)),
        "versions": doctor.versions(),
    }
    rows = run_grid(options.out, data, models, grid, scorer, about=about, pictures=options.pictures)
    if rows:
        print(f"\n{write_results(Path(options.out), rows, scorer.columns)}\n\n{len(rows)} rows in {options.out}")


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (equals and name and path):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, path

"""``sra eval``: what it does with its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import doctor
from ..errors import ConfigError
from ..eval.checked_arguments import check_reserved
from ..eval.datasets import load_examples
from ..eval.evaluate import evaluate as run_grid
from ..eval.examples import FAMILIES, procedural
from ..eval.grid import Grid
from ..eval.methods import RULES, method_name
from ..eval.metrics import InceptionFeatures
from ..eval.models import EvalModel
from ..eval.rfid import rfid_of_folder, rfid_table, write_rfid
from ..eval.rival_settings import is_rival
from ..eval.scores import Scorer
from ..eval.tables import write_results
from ..toy.pipeline import TRAINED, knows_open_scenery
from ..vocabulary import FEWER, OPEN_SCENERY
from .commands.evaluate import KEEPS
from .frontier import check as check_frontier
from .frontier import frontier
from .logs import quiet
from .terminal import saved, show
from .values import typed

__all__ = ["evaluate"]


FRONTIER_METRICS = ("psnr", "subject-psnr", "scenery-contrast")


def evaluate(options: argparse.Namespace) -> None:
    """Make what is missing of the grid, or of the frontier's sweep, then tables and plots of all rows."""
    check_frontier(options)
    if options.data is not None and options.sprites is not None:
        raise ConfigError("--sprites must come without --data, got both")
    if options.data is not None and options.models is None:
        raise ConfigError("--data must come with --models: the small model knows its own task alone, got none")
    given = [("small", TRAINED)] if options.models is None else options.models
    names = [name for name, _ in given]
    if len(set(names)) < len(names):
        raise ConfigError(f"models must have names of their own, got {', '.join(names)}")
    check_reserved(dict(options.set or ()))
    if options.rfid:
        if options.pictures < 2:
            raise ConfigError(f"--rfid must come with --pictures of at least 2, got {options.pictures}")
        InceptionFeatures()  # what is not installed is told before the first picture is made
    quiet(pipelines_too=True)
    if options.data is None:
        open_too = all(knows_open_scenery(path) for _, path in given)
        known = [family for family in FAMILIES if open_too or family != OPEN_SCENERY]
        data = procedural(
            options.sprites, side=128 if options.side is None else options.side, families=options.families or known
        )
    else:
        data = load_examples(options.data, options.layout)
    fits = {"subject mask": data.reference_masks, "learned": options.models is None}
    rules = [rule for rule in (*RULES, FEWER) if fits.get(rule, True)]
    if options.rules is not None:
        rules = options.rules
        if "subject mask" in rules and not data.reference_masks:
            raise ConfigError('"subject mask" must have masks of the references, got a data set without any')
    methods = dict.fromkeys(
        rule if is_rival(rule) else method_name(rule, schedule) for schedule in options.schedules for rule in rules
    )
    grid = Grid(
        tuple(methods), tuple(KEEPS if options.keep is None else options.keep), options.seeds,
        None if options.families is None or options.data is None else tuple(options.families), options.subjects,
        options.mean_over,
    )  # fmt: skip
    data.chosen(grid.families, grid.count)  # a family that is not there is told before anything is loaded
    names = options.metrics
    if options.frontier and names is None:
        needs = {"subject-psnr": data.masks, "scenery-contrast": data.open_scenery}
        names = [name for name in FRONTIER_METRICS if needs.get(name, True)]
    scorer = Scorer(data, names, clip=options.clip, dino=options.dino, auraface=options.auraface)
    steps = options.steps or (12 if options.frontier else 8)
    models = [
        EvalModel(
            name, path, side=options.side, steps=steps, device=options.device, dtype=options.dtype,
            more=dict(options.set or ()),
        )
        for name, path in given
    ]  # fmt: skip
    about = {
        "command": typed(options),
        "device": doctor.device(str(models[0].pipe.device)),
        "versions": doctor.versions(),
    }
    if options.frontier:
        frontier(options, data, models[0], scorer, about)
        return
    rows = run_grid(options.out, data, models, grid, scorer, about=about, pictures=options.pictures)
    if rows:
        out = Path(options.out)
        show(f"\n{write_results(out, rows, scorer.columns, models[0].steps)}")
        distances = rfid_of_folder(out) if options.rfid else []
        if distances:
            write_rfid(out / "rfid.csv", distances)
            show(f"\n## rFID ({InceptionFeatures.name})\n\n{rfid_table(distances)}")
        saved(
            out,
            [
                ("rows.csv", f"{len(rows)} rows, one a picture"),
                ("summary.csv", "means and paired differences, with intervals"),
                ("summary.md", "the tables"),
                ("*.png", "plots of each metric"),
                *([("rfid.csv", "each method's pictures as a set")] if distances else []),
                ("pictures/", "of the first examples"),
                ("eval.json", "settings, weights and versions"),
            ],
        )

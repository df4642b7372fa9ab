"""``sra eval --frontier``: what it does with its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..eval.evaluate import processes
from ..eval.examples import Examples
from ..eval.frontier.figure import figure
from ..eval.frontier.listed import GEOMETRIES
from ..eval.frontier.points import points_of
from ..eval.frontier.sweep import sweep
from ..eval.frontier.table import markdown
from ..eval.models import EvalModel
from ..eval.scores import Scorer
from ..frontier import write_points
from .terminal import saved, show

__all__ = ["check", "frontier"]


def check(options: argparse.Namespace) -> None:
    """Raise ConfigError for what belongs to the grid of rules and shares, or to the sweep alone."""
    if options.frontier:
        if options.rules is not None or options.keep is not None or options.schedules != ["flat"]:
            raise ConfigError("--frontier sweeps its own list: --rules, --schedules and --keep must come without it")
        if options.models is not None and len(options.models) > 1:
            raise ConfigError(f"--frontier must come with one model, got {len(options.models)}")
        if options.rfid:
            raise ConfigError("--rfid must come without --frontier, which keeps no pictures, got both")
    elif options.candidates is not None or options.first is not None:
        raise ConfigError("--candidates and --first must come with --frontier, got it not")


def frontier(
    options: argparse.Namespace, data: Examples, model: EvalModel, scorer: Scorer, about: Mapping[str, Any]
) -> None:
    """Sweep, then write ``frontier.csv``, a table and a figure for each published model."""
    chosen = options.families is not None and options.data is not None  # the procedural task is made of them
    families = tuple(options.families) if chosen else None
    fewest = min(len(data.chosen((family,), None)) for family in families or data.families)
    out, first = Path(options.out), 8 if options.first is None else options.first
    rank, _ = processes()
    losses = sweep(
        out, data, model, scorer, first=first, last=options.subjects or fewest, seeds=options.seeds, families=families,
        keys=options.candidates, about=about, told=_quiet if rank else show,
    )  # fmt: skip
    if rank:
        return
    points = list(points_of(losses, model.steps, model.id))
    write_points(points, out / "frontier.csv")
    (out / "frontier.md").write_text(f"# The frontier\n\n{markdown(points)}\n", encoding="utf-8")
    models = list(dict.fromkeys(name for name, _ in GEOMETRIES))
    for name in models:
        figure(points, out / f"frontier-{name}.png", model=name)
    saved(
        out,
        [
            ("frontier.csv", f"{len(points)} points, one a setting and kind of edit"),
            ("frontier.md", "the table: what each setting loses and saves, and what to write"),
            *((f"frontier-{name}.png", f"loss over work at {name}'s sizes") for name in models),
            ("rows.csv", "a row a picture"),
            ("eval.json", "settings, weights and versions"),
        ],
    )


def _quiet(text: str) -> None:
    """In place of what the first process tells."""

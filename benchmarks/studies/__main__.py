"""Runs the studies. What is already in the folder is not run again, so that a killed command goes on where it was."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import append, environment
from sparse_ref_attn.cli.values import named
from sparse_ref_attn.eval.models import EvalModel
from sparse_ref_attn.toy.pipeline import TRAINED

from . import (
    caches,
    cases,
    direction,
    fewer_steps,
    isolation,
    mass,
    methods,
    reading,
    reading_work,
    rest,
    reuse,
    sparse_context,
    stability,
    sweep,
    tasks,
    tuning,
)
from .generator import Generator
from .study import Study

PICTURES = {
    "methods": methods, "tasks": tasks, "sweep": sweep, "direction": direction, "reuse": reuse, "caches": caches,
    "sparse_context": sparse_context, "reading": reading, "rest": rest, "isolation": isolation, "tuning": tuning,
}  # fmt: skip
ATTENTION = {"mass": mass.STUDY, "stability": stability.STUDY}
OTHERS = {"reading_work": reading_work.STUDY, "fewer_steps": fewer_steps.STUDY}
WEIGHTS = Path(__file__).parent.parent / "weights"
CONTINUED = ("control", "drop", "drop-full", "isolated", "alongside")
MODELS = {"dense": TRAINED, **{name: WEIGHTS / name for name in CONTINUED}}
"""Name, and folder of the transformer."""
NAMES = (*ATTENTION, *PICTURES, *OTHERS)
RUNS = ("study", "model", "weights", "parameters", "steps", "subjects", "seeds", "seconds", "threads", "date", "commit",
        "device", "torch", "diffusers")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", type=named, default=[], metavar="NAME=PATH",
        help=f"transformer folders beside or in place of those that ship: {', '.join(MODELS)}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results" / "studies")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--subjects", type=int, default=16, help="held-out subjects, up to 107")
    parser.add_argument("--seeds", type=int, default=2, help="of each subject")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    args = parser.parse_args(argv)
    if min(args.subjects, args.seeds) < 1 or args.steps < 3:
        parser.error(
            "subjects and seeds must be at least 1 and steps at least 3, "
            f"got {args.subjects}, {args.seeds} and {args.steps}"
        )
    folders = MODELS | dict(args.models)
    with torch.no_grad():
        models = [EvalModel(name, str(folder), steps=args.steps) for name, folder in folders.items()]
        generators = {model.name: Generator(model) for model in models}
        for name in args.only:
            _note(name, generators, args, None)
            began = time.perf_counter()
            study(name, args.steps).measure(
                args.out / f"{name}.csv", generators, args.subjects, args.seeds, partial(_tell, name)
            )
            _note(name, generators, args, time.perf_counter() - began)


def study(name: str, steps: int) -> Study:
    """By its name, at so many steps."""
    others = ATTENTION | OTHERS
    return others[name] if name in others else cases.pictures(PICTURES[name].cases(steps))


def _tell(name: str, done: int, of: int) -> None:
    print(f"\r{name}: {done} of {of} subjects and seeds", end="\n" if done == of else "", file=sys.stderr, flush=True)


def _note(name: str, generators: dict[str, Generator], args: argparse.Namespace, seconds: float | None) -> None:
    """A line a study and model in ``runs.csv``: where rows are measured, and at the end how many seconds it took."""
    about: list[dict[str, Any]] = [
        {
            "study": name, "model": model, "weights": generator.weights, "steps": args.steps,
            "parameters": sum(p.numel() for p in generator.pipe.transformer.parameters()),
            "subjects": args.subjects, "seeds": args.seeds, "seconds": None if seconds is None else round(seconds),
            "threads": torch.get_num_threads(), **environment(torch.device("cpu")),
        }
        for model, generator in generators.items()
    ]  # fmt: skip
    append(about, args.out / "runs.csv", RUNS)


if __name__ == "__main__":
    main()

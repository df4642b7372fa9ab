"""``sra demo``: what it does with its arguments."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from .. import doctor
from ..config import SparseRef
from ..estimation import Amount, preset_of
from ..eval import outputs
from ..eval.compare import compare
from ..eval.equal_time import run_rivals
from ..eval.reports.document import about_pipeline
from . import calling, failures
from .builtin import Builtin, builtin
from .common import settings
from .logs import quiet
from .memory import memory_of
from .terminal import saved, show

__all__ = ["demo"]


def demo(options: argparse.Namespace) -> None:
    """Dense and sparse side by side, on a built-in pipeline."""
    made = builtin(options, options.image)
    small = made.pair is not None
    given = settings(options)
    if options.preset is None:
        options.preset = preset_of(options.keep, given) if small else "sparse-context"
    preset = options.preset
    if preset == "sparse-context":
        given.setdefault("task", "subject" if small else "edit")
        options.keep = 0.25 if options.keep is None else options.keep
    elif preset == "recast" and not small:
        given.setdefault("task", "subject")
    if small and preset == "recast" and options.keep is None:
        given |= {"n_min": 0.25, "n_max": 0.25}  # the paper's ramp would begin with 16 tokens of 256
    amount = Amount(preset, options.keep, given)
    directory = outputs.prepare_directory(options.out)
    quiet(pipelines_too=True)
    began = time.perf_counter()
    pipe = made.build()
    seconds = time.perf_counter() - began
    config = amount.config(pipe.transformer, made.steps)
    show(f"Built a small FLUX.1 Kontext pipeline of diffusers' own classes in {seconds:.1f} s.\n{made.note}")
    if preset == "recast" and not small and options.task is None:
        show('ReCAST runs with task="subject": random attention is near uniform, and the guard of "auto" keeps all.')
    if small:
        show(f'Prompt: "{made.arguments["prompt"]}"')
    _compare(pipe, config, made, options, directory)


def _compare(pipe: Any, config: SparseRef, made: Builtin, options: argparse.Namespace, directory: Path) -> None:
    arguments, steps, pair = made.arguments, made.steps, made.pair
    call = calling.caller(pipe, arguments, options.seed)
    where = doctor.device("cpu")
    show(f"{options.preset}: {config.describe()}; {steps} steps, seed {options.seed}; {where}.\n")
    pictures = outputs.Pictures(directory)
    with failures.told(directory, pictures.written, memory_of(pipe, config, arguments, options)):
        result = compare(pipe, config, call, steps=steps, repeats=options.repeats, made=pictures)
        rivals = run_rivals(pipe, {outputs.SPARSE: result}, call, steps=steps, repeats=options.repeats)
    about = about_pipeline(pipe, None, where, arguments, steps)
    about |= {"preset": options.preset, "seed": options.seed, "repeats": options.repeats}
    about |= {"methods": {outputs.SPARSE: config.describe()}, "note": made.note.replace("\n", " ")}
    files, answer = [], None
    if pair is not None:
        files = outputs.write_answer(directory, arguments["image"], pair, result)
        answer = outputs.against_answer(result, pair)
    files += outputs.write(directory, result, about, rivals, answer)
    show(f"\n{outputs.table(result, rivals)}\n\nInside the transformer, sparse run\n\n{result.summary()}")
    if answer is not None:
        show("\n" + "\n".join(f"{name}: {value:.1f} dB" for name, value in answer.items()))
    saved(directory, files)

"""The command line: ``python -m sparse_ref_attn``, or ``sra``."""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from . import __version__, doctor
from .adapters.geometries import MODELS
from .config import TASKS, ReCAST, SparseContext, SparseRef
from .errors import ConfigError, SparseRefError
from .eval import loading, outputs
from .eval.compare import Comparison, compare
from .eval.embedded import SIZES, kontext_pipeline
from .eval.geometry import meta_transformer
from .selection.names import NAMES

__all__ = ["main"]

PRESETS = ("recast", "sparse-context")
DEMO_PROMPT = "the same cup on a marble table"
RANDOM_WEIGHTS = (
    "Its weights are random (seeded): the pictures mean nothing, and neither does what the model looks at.\n"
    "Real are the speed of a whole call, and which tokens the rule keeps of the photo."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the program's name; default those of this process.

    Returns
    -------
    int
        0, or 2 after a line on stderr that says what was wrong.

    Examples
    --------
    >>> main(["doctor", "--json"])  # doctest: +ELLIPSIS
    {
      "versions": {
    ...
    0
    """
    try:
        options = _parser().parse_args(argv)
        options.run(options)
    except SparseRefError as error:
        print(f"sra: error: {error}", file=sys.stderr)
        return 2
    return 0


# -- demo ------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> None:
    keep = options.keep
    if keep is None and options.preset == "sparse-context":
        keep = 0.25
    config = _config(options.preset, keep, task="subject" if options.preset == "recast" else "edit")
    photo = loading.open_image(options.image or str(importlib.resources.files(__package__) / "assets" / "photo.jpg"))
    directory = outputs.prepare_directory(options.out)
    _quiet(pipelines_too=True)
    size = SIZES[options.size]
    began = time.perf_counter()
    pipe = kontext_pipeline(options.size)
    seconds = time.perf_counter() - began
    print(f"Built a small FLUX.1 Kontext pipeline of diffusers' own classes in {seconds:.1f} s.\n{RANDOM_WEIGHTS}")
    if options.preset == "recast":
        print('ReCAST runs with task="subject": random attention is near uniform, and the guard of "auto" keeps all.')
    photo = _fitted(photo, size.side, size.pixels_per_token)
    arguments = {
        "prompt": options.prompt,
        "image": photo,
        "height": photo.height,
        "width": photo.width,
        "max_area": photo.height * photo.width,
        "_auto_resize": False,
        "max_sequence_length": size.text,
        "num_inference_steps": options.steps,
    }
    about = {"weights": "seeded random numbers: the pictures mean nothing"}
    _compare(pipe, config, arguments, options, directory, "cpu", about)


def _fitted(photo: Any, side: int, multiple: int) -> Any:
    """The photo at an area of about ``side**2`` pixels, its sides multiples of `multiple`."""
    scale = side / (photo.width * photo.height) ** 0.5
    width, height = (max(1, round(scale * edge / multiple)) * multiple for edge in photo.size)
    return photo if (width, height) == photo.size else photo.resize((width, height))


# -- run -------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> None:
    config = _config(options.preset, options.keep, task=options.task, select=options.select)
    if (options.height is None) != (options.width is None):
        raise ConfigError("--height and --width must be given together, got one of them")
    size = None if options.height is None else (options.height, options.width)
    images = [loading.open_image(path) for path in options.image]
    directory = outputs.prepare_directory(options.out)
    _quiet(pipelines_too=False)
    pipe, device = loading.load_pipeline(
        options.model, device=options.device, dtype=options.dtype, offload=options.offload
    )
    more = dict(options.set or ())
    arguments = loading.call_arguments(pipe, images, options.prompt, size=size, steps=options.steps, more=more)
    print(f"Loaded {type(pipe).__name__} from {options.model} on {device}.")
    about = {"model": options.model, "images": options.image}
    _compare(pipe, config, arguments, options, directory, device, about)


def _compare(
    pipe: Any,
    config: SparseRef,
    arguments: dict[str, Any],
    options: argparse.Namespace,
    directory: Any,
    device: str,
    about: dict[str, Any],
) -> None:
    steps = arguments.pop("num_inference_steps")

    def call(steps: int) -> Any:
        generator = torch.Generator("cpu").manual_seed(options.seed)
        try:
            return pipe(**arguments, num_inference_steps=steps, generator=generator).images[0]
        except ValueError as error:  # how diffusers refuses a picture or an argument
            if isinstance(error, SparseRefError):
                raise
            raise ConfigError(f"{type(pipe).__name__} refused the call: {error}") from error

    print(f"{options.preset}: {config.describe()}; {steps} steps, seed {options.seed}.\n", flush=True)
    result = compare(pipe, config, call, steps=steps, repeats=options.repeats, dense=options.compare_dense)
    about = {
        "pipeline": type(pipe).__name__,
        **about,
        "device": doctor.device() if device != "cpu" else f"CPU, {torch.get_num_threads()} threads",
        "arguments": {k: v for k, v in arguments.items() if isinstance(v, (str, int, float, list))} | {"steps": steps},
        "preset": options.preset,
        "seed": options.seed,
        "versions": doctor.versions(),
    }
    about["arguments"].pop("image", None)
    _print(result, outputs.write(directory, result, about), directory)


def _print(result: Comparison, files: list[tuple[str, str]], directory: Any) -> None:
    print(f"\n{outputs.table(result)}\n\nInside the transformer, sparse run\n")
    print(f"{result.summary()}\n\nWritten to {directory}")
    for name, what in files:
        print(f"  {name:<12} {what}")


# -- estimate, doctor ------------------------------------------------------------------------


def _estimate(options: argparse.Namespace) -> None:
    from .adapters.estimate import estimate

    _quiet(pipelines_too=True)

    found = estimate(
        meta_transformer(options.model),
        references=[options.size] * options.references,
        output=options.output,
        text_tokens=options.text_tokens,
        steps=options.steps,
        config=_config(options.preset, options.keep),
    )
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.summary())


def _doctor(options: argparse.Namespace) -> None:
    print(json.dumps(doctor.diagnose(), indent=2) if options.json else doctor.report())


# -- arguments -------------------------------------------------------------------------------


def _config(preset: str, keep: float | int | None, task: str | None = None, select: str | None = None) -> SparseRef:
    """The preset with its own defaults for what is not given."""
    settings: dict[str, Any] = {} if task is None else {"task": task}
    if select is not None:
        settings["select"] = select
    if preset == "sparse-context":
        return SparseContext(**settings) if keep is None else SparseContext(keep, **settings)
    if keep is None:
        return ReCAST(**settings)
    if isinstance(keep, int):
        raise ConfigError(f"--keep of recast must be a share such as 0.25 or 25%, got {keep} tokens")
    most = 4096  # ReCAST's reference size; the budget is a ratio of it
    last = round(keep * most)
    if not 0 < last <= most:
        raise ConfigError(f"--keep must lie in (0, 1] as a share, got {keep}")
    return ReCAST(max(1, last // 4), last, reference_tokens=most, **settings)


def _keep(text: str) -> float | int:
    """ "0.25" and "25%" are shares, "256" is a number of tokens."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        keep: float | int = int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a share (0.25, 25%) or a number of tokens (256), got {text!r}"
        ) from None
    if keep == 1 and isinstance(keep, int):
        raise argparse.ArgumentTypeError("1 means one token or all of them: write 100% for all, got '1'")
    return keep


def _above(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return number


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, got {text!r}")
    return int(width), int(height)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


class _Parser(argparse.ArgumentParser):
    """Its errors are the library's: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sra",
        description="Runs reference-conditioned diffusion transformers on the reference tokens that matter.",
    )
    parser.add_argument("--version", action="version", version=f"sparse_ref_attn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="dense and sparse side by side, offline, on random weights",
        description="Builds a small FLUX.1 Kontext pipeline (diffusers' own classes), runs it dense and sparse on a "
        "photo, and reports times, tokens and bound. " + RANDOM_WEIGHTS.replace("\n", " "),
    )
    demo.add_argument("--out", required=True, metavar="DIR", help="where pictures and report.json go")
    demo.add_argument("--image", metavar="PATH", help="reference photo (default: a bundled one)")
    demo.add_argument("--prompt", default=DEMO_PROMPT)
    demo.add_argument("--steps", type=_above(1), default=8, help="denoising steps (default: %(default)s)")
    demo.add_argument("--size", choices=SIZES, default="demo", help='"tiny" takes no time and shows no gain')
    _add_config(demo, "sparse-context", "25%% of the tokens by edges; recast rises from 1/16 to 1/4")
    _add_common(demo)
    demo.set_defaults(run=_demo, compare_dense=True)

    run = commands.add_parser(
        "run",
        help="the same with a real model: FLUX.1 Kontext, FLUX.2, Klein, Qwen-Image-Edit",
        description="Loads a diffusers pipeline, edits the images dense and sparse with the same seed, and reports "
        "times, tokens and bound.",
    )
    run.add_argument("--model", required=True, metavar="PATH", help="directory of save_pretrained, or a hub id")
    run.add_argument("--image", required=True, action="append", metavar="PATH", help="reference; repeat for several")
    run.add_argument("--prompt", required=True)
    run.add_argument("--out", required=True, metavar="DIR", help="where pictures and report.json go")
    _add_config(run, "recast", "recast: 1/16 to 1/4, rising; sparse-context: 10%%")
    run.add_argument("--task", choices=TASKS, help="kind of edit, which picks rule and guard (default: the preset's)")
    run.add_argument("--select", choices=NAMES, help="rule that ranks the tokens (default: the preset's)")
    run.add_argument("--height", type=_above(16), help="of the output, in pixels")
    run.add_argument("--width", type=_above(16))
    run.add_argument("--steps", type=_above(1), help="denoising steps (default: the pipeline's)")
    run.add_argument("--dtype", choices=loading.DTYPES, help="default: bfloat16 on CUDA, float32 elsewhere")
    run.add_argument("--device", help="default: cuda where there is one, else cpu")
    run.add_argument("--offload", choices=loading.OFFLOADS, default="none", help="keep the model in the CPU's memory")
    run.add_argument(
        "--compare-dense", action=argparse.BooleanOptionalAction, default=True, help="also run with every token"
    )
    run.add_argument(
        "--set", action="append", type=_setting, metavar="NAME=VALUE", help="argument of the pipeline's own call"
    )
    _add_common(run)
    run.set_defaults(run=_run)

    guess = commands.add_parser(
        "estimate",
        help="tokens, work and memory of a run, without running it",
        description="Tokens, FLOPs and memory of a run from sizes alone; needs no weights.",
    )
    guess.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or a pipeline's directory")
    guess.add_argument("--references", type=_above(1), default=1, metavar="N", help="how many (default: %(default)s)")
    guess.add_argument("--size", type=_size, default=(1024, 1024), metavar="WxH", help="of each (default: 1024x1024)")
    guess.add_argument("--output", type=_size, default=(1024, 1024), metavar="WxH", help="default: 1024x1024")
    guess.add_argument("--text-tokens", type=_above(0), default=512, metavar="N", help="default: %(default)s")
    guess.add_argument("--steps", type=_above(1), default=28, help="default: %(default)s")
    _add_config(guess, "recast", "recast: 1/16 to 1/4, rising; sparse-context: 10%%")
    guess.add_argument("--json", action="store_true")
    guess.set_defaults(run=_estimate)

    check = commands.add_parser("doctor", help="what is installed, and what is possible here")
    check.add_argument("--json", action="store_true")
    check.set_defaults(run=_doctor)
    return parser


def _add_config(parser: argparse.ArgumentParser, preset: str, keep: str) -> None:
    parser.add_argument("--preset", choices=PRESETS, default=preset, help="default: %(default)s")
    parser.add_argument("--keep", type=_keep, metavar="R", help=f"share (0.25, 25%%) or tokens (256); default: {keep}")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_above(0), default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=_above(1), default=1, metavar="N", help="runs of each, in turns; times are medians"
    )


def _quiet(pipelines_too: bool) -> None:
    """Silence notes about optional parts that other libraries lack; diffusers may warn about a real model's call."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("transformers", "diffusers")[: 1 + pipelines_too]:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(f"{name}.utils.logging").set_verbosity_error()

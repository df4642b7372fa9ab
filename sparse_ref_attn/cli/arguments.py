"""The commands and their arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NoReturn

from .. import __version__
from ..adapters.geometries import MODELS
from ..errors import ConfigError
from ..eval import loading
from ..eval.methods import METHODS
from ..presets import TASKS
from ..selection.names import NAMES
from . import amount, benching, builtin, commands, evaluating, execution, training

__all__ = ["parser"]

PRESETS = tuple(amount.FAMILIES)


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
        raise argparse.ArgumentTypeError("1 means one token or all of them: write 100% to keep all, got '1'")
    return keep


def _share(text: str) -> float:
    keep = _keep(text)
    if isinstance(keep, int) or not 0 < keep <= 1:
        raise argparse.ArgumentTypeError(f"must be a share in (0, 1] such as 0.25 or 25%, got {text!r}")
    return keep


def _above(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return number


def _seed(text: str) -> int:
    if not text.isdecimal() or not int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2**64), got {text!r}")
    return int(text)


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


def parser() -> argparse.ArgumentParser:
    """The whole command line; parsed options have `run`, the command to call with them."""
    top = _Parser(
        prog="sra",
        description="Runs reference-conditioned diffusion transformers on the reference tokens that matter.",
    )
    top.add_argument("--version", action="version", version=f"sparse_ref_attn {__version__}")
    top.add_argument("--traceback", action="store_true", help="where an error comes from, in place of one line")
    kinds = top.add_subparsers(required=True, metavar="COMMAND")

    demo = kinds.add_parser(
        "demo",
        help="dense and sparse side by side, offline, on a small trained model",
        description="Builds a FLUX.1 Kontext pipeline (diffusers' own classes), runs it dense and sparse, and reports "
        "times, tokens and bound. The small one is trained: it puts subjects that it never saw where the prompt says.",
    )
    demo.add_argument("--out", required=True, metavar="DIR", help="where pictures and report.json go")
    demo.add_argument(
        "--image", metavar="PATH", help="photo: the reference, or what the small model's subjects stand on"
    )
    demo.add_argument("--prompt", help="with --size large or tiny")
    demo.add_argument("--steps", type=_above(1), help="denoising steps (default: 12; random weights: 8)")
    builtin.add_arguments(demo)
    _add_config(
        demo,
        None,
        "a quarter at every step that drops any; recast with random weights: 1/16 to 1/4, rising",
        "recast; random weights: sparse-context",
    )
    _add_common(demo)
    demo.set_defaults(run=commands.demo, compare_dense=True)

    run = kinds.add_parser(
        "run",
        help="the same with a real model: FLUX.1 Kontext, FLUX.2, Klein, Qwen-Image-Edit",
        description="Loads a diffusers pipeline, edits the images dense and sparse with the same seed, and reports "
        "times, tokens and bound.",
    )
    _add_model(run)
    _add_config(run, "recast", "recast: 1/16 to 1/4, rising; sparse-context: 10%%")
    run.add_argument("--task", choices=TASKS, help="kind of edit, which picks rule and guard (default: the preset's)")
    run.add_argument("--select", choices=NAMES, help="rule that ranks the tokens (default: the preset's)")
    run.add_argument(
        "--compare-dense", action=argparse.BooleanOptionalAction, default=True, help="also run with every token"
    )
    _add_common(run)
    run.set_defaults(run=commands.run)

    versus = kinds.add_parser(
        "compare",
        help="many ways to spend the same tokens, side by side in one page",
        description="Runs one pipeline dense and with each method at the same share of the tokens, same seed, in "
        "turns, and writes an HTML page with pictures, kept tokens, metrics against the dense picture, times and "
        "bounds; also CSV, JSON and markdown. --profile and --rerank-every reach the methods that measure attention.",
    )
    _add_model(versus, required=False)
    versus.add_argument(
        "--keep", type=_share, default=0.25, metavar="R", help="mean share of the tokens over all steps (default: 25%%)"
    )
    versus.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS)
    )
    builtin.add_arguments(versus)
    versus.add_argument("--clip", metavar="PATH", help="folder of a CLIP model: adds CLIP-I")
    versus.add_argument("--dino", metavar="PATH", help="folder of a DINO or DINOv2 model: adds its similarity")
    execution.add_arguments(versus, _above)
    _add_common(versus)
    versus.set_defaults(run=commands.compare_methods)

    judge = kinds.add_parser(
        "eval",
        help="models, rules and shares over a data set: rows, intervals, plots",
        description="Makes pictures dense and with each rule at each share of the tokens, scores them against the "
        "dense ones and the answers, and appends a row for each. A run that was stopped goes on; several processes "
        "share the work under accelerate launch or torchrun.",
    )
    evaluating.add_arguments(judge, _above, _share, _setting)

    learn = kinds.add_parser(
        "train",
        help="train the small model, or a LoRA of a real one, with or without dropping reference tokens",
        description="Flow matching on (reference, prompt, target), resumable bit for bit; several processes under "
        "accelerate launch. A LoRA of FLUX.1 Kontext on a folder of pairs, or the small model on its procedural task.",
    )
    training.add_arguments(learn, _above, _seed)

    guess = kinds.add_parser(
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
    guess.set_defaults(run=commands.estimate)

    build = kinds.add_parser(
        "build-kernels",
        help="compile the CUDA C++ kernels with nvcc, for the cards of this machine",
        description="Compiles csrc with nvcc and ninja into the user's cache, where every later process finds it. "
        "Nothing else ever compiles them on use. ninja_build.md says what each error means.",
    )
    build.add_argument(
        "--archs",
        metavar="LIST",
        help='such as "80;90a"; default SRA_CUDA_ARCHS, else the cards found, else 80;90a;100a',
    )
    build.set_defaults(run=commands.build)

    bench = kinds.add_parser(
        "bench",
        help="measure it: ops, steps, whole pipelines, beside rivals and bounds (in a checkout of the repository)",
        add_help=False,
        prefix_chars="\0",  # every word, --help too, is the benchmarks' own
    )
    bench.add_argument("arguments", nargs="*")
    bench.set_defaults(run=benching.bench)

    check = kinds.add_parser("doctor", help="what is installed, and what is possible here")
    check.add_argument("--json", action="store_true")
    check.add_argument(
        "--verify", action="store_true", help="compare every backend with float64 on this device, time them, keep that"
    )
    check.set_defaults(run=commands.diagnose)
    return top


def _add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """A pipeline and the arguments of its call; not required where the embedded one stands in."""
    default = "" if required else " (default: the small trained one)"
    parser.add_argument(
        "--model", required=required, metavar="PATH", help=f"directory of save_pretrained, or a hub id{default}"
    )
    parser.add_argument(
        "--image", required=required, action="append", metavar="PATH", help="reference; repeat for several"
    )
    parser.add_argument("--prompt", required=required)
    parser.add_argument("--out", required=True, metavar="DIR", help="where pictures and numbers go")
    parser.add_argument("--height", type=_above(16), help="of the output, in pixels")
    parser.add_argument("--width", type=_above(16))
    parser.add_argument("--steps", type=_above(1), help="denoising steps (default: the pipeline's)")
    parser.add_argument("--dtype", choices=loading.DTYPES, help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--offload", choices=loading.OFFLOADS, default="none", help="keep the model in the CPU's memory"
    )
    parser.add_argument(
        "--set", action="append", type=_setting, metavar="NAME=VALUE", help="argument of the pipeline's own call"
    )


def _add_config(parser: argparse.ArgumentParser, preset: str | None, keep: str, default: str = "%(default)s") -> None:
    parser.add_argument("--preset", choices=PRESETS, default=preset, help=f"default: {default}")
    parser.add_argument("--keep", type=_keep, metavar="R", help=f"{amount.KEEP}; default: {keep}")
    execution.add_arguments(parser, _above)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_seed, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=_above(1), default=1, metavar="N", help="runs of each, in turns; times are medians"
    )

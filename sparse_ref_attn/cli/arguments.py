"""The commands and their arguments; nothing of what they run is imported for them."""

from __future__ import annotations

import argparse

from .. import __version__, vocabulary
from . import execution, values
from .editor import add_run
from .evaluation import add_evaluation
from .failures import CODES
from .parsing import Parser, later
from .trainer import add_training

__all__ = ["parser"]

KEEP = "mean share of the reference tokens over all steps, a dense one included (25%%, 0.25), or with sparse-context "
KEEP += "tokens of each reference at every step that drops any (256)"
OWN = "recast: 1/16 to 1/4, rising; sparse-context: 10%%"
TASK = "kind of edit, which picks rule and guard (default: the preset's)"
STEPS = "denoising steps (default: the pipeline's, 4 of a distilled model)"
RUN = """\
Edits pictures with a diffusers pipeline, computing the reference tokens that
matter alone.

  sra run photo.jpg -p "the cup on a beach" -o out.png --model PATH
  sra run cup.jpg table.jpg -p "the cup on the table" -o out.png --model PATH
  sra run photos/ -p "as a watercolour" -o out/ --model PATH
  sra run edits.jsonl -o out/ --model PATH

Each picture is saved as soon as it exists, and says in its file how it was
made. Of many edits, those that are there already are not made again, and one
that cannot be made does not end the others."""


def parser() -> Parser:
    """The whole command line; parsed options have `run`, the command to call with them."""
    top = Parser(
        prog="sra",
        description="Runs reference-conditioned diffusion transformers on the reference tokens that matter.",
        epilog="Exit codes: " + "; ".join(f"{code} {words}" for code, words in CODES.items()) + ".",
    )
    top.add_argument("--version", action="version", version=f"sparse_ref_attn {__version__}")
    top.add_argument("--traceback", action="store_true", help="where an error comes from, in place of one line")
    top.set_defaults(run=None)
    kinds = top.add_subparsers(metavar="COMMAND", title="commands")

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
    demo.add_argument("--prompt", help="with --builtin large or tiny")
    demo.add_argument("--steps", type=values.above(1), help="denoising steps (default: 12; random weights: 8)")
    _add_builtin(demo)
    _add_config(
        demo,
        None,
        "25%%; recast after its dense step: a quarter, with random weights 1/16 to 1/4, rising",
        "recast; random weights: sparse-context",
    )
    _add_common(demo)
    demo.set_defaults(run=later("commands", "demo"))

    run = kinds.add_parser(
        "run",
        help="edit pictures with a model: FLUX.1 Kontext, FLUX.2, Klein, Qwen-Image-Edit",
        usage="%(prog)s IMAGE [IMAGE ...] -p TEXT -o PATH [--model PATH] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=RUN,
    )
    add_run(run)
    _add_config(run, "recast", OWN)

    versus = kinds.add_parser(
        "compare",
        help="many ways to spend the same tokens, side by side in one page",
        description="Runs one pipeline dense and with each method at the same share of the tokens, same seed, in "
        "turns, and writes an HTML page with pictures, kept tokens, metrics against the dense picture, times and "
        "bounds; also CSV, JSON and markdown. --profile and --rerank-every reach the methods that measure attention.",
    )
    _add_model(versus)
    versus.add_argument(
        "--keep", type=values.share, default=0.25, metavar="R", help="mean share over all steps (default: 25%%)"
    )
    versus.add_argument(
        "--methods",
        nargs="+",
        **values.one_of(vocabulary.METHODS, vocabulary.SAME) | {"metavar": "NAME"},
        default=list(vocabulary.METHODS),
        help=", ".join(vocabulary.METHODS),
    )
    _add_builtin(versus)
    versus.add_argument("--clip", metavar="PATH", help="folder of a CLIP model: adds CLIP-I")
    versus.add_argument("--dino", metavar="PATH", help="folder of a DINO or DINOv2 model: adds its similarity")
    execution.add_arguments(versus)
    _add_common(versus)
    versus.set_defaults(run=later("commands", "compare_methods"))

    judge = kinds.add_parser(
        "eval",
        help="models, rules and shares over a data set: rows, intervals, plots",
        description="Makes pictures dense and with each rule at each share of the tokens, scores them against the "
        "dense ones and the answers, and appends a row for each. A run that was stopped goes on; several processes "
        "share the work under accelerate launch or torchrun.",
    )
    add_evaluation(judge)

    learn = kinds.add_parser(
        "train",
        help="train the small model, or a LoRA of a real one, with or without dropping reference tokens",
        description="Flow matching on (reference, prompt, target), resumable bit for bit; several processes under "
        "accelerate launch. A LoRA of FLUX.1 Kontext on a folder of pairs, or the small model on its procedural task.",
    )
    add_training(learn)

    guess = kinds.add_parser(
        "estimate",
        help="tokens, work and memory of a run, without running it",
        description="Tokens, FLOPs and memory of a run from sizes alone; needs no weights.",
    )
    guess.add_argument("--model", required=True, help=f"{', '.join(vocabulary.MODELS)}, or a pipeline's directory")
    guess.add_argument(
        "--references", type=values.above(1), default=1, metavar="N", help="how many (default: %(default)s)"
    )
    guess.add_argument(
        "--reference-size",
        "--size",
        type=values.size,
        default=(1024, 1024),
        metavar="WxH",
        help="of each (default: 1024x1024)",
    )
    guess.add_argument(
        "--output", type=values.size, default=(1024, 1024), metavar="WxH", help="in pixels (default: 1024x1024)"
    )
    guess.add_argument("--text-tokens", type=values.above(0), default=512, metavar="N", help="default: %(default)s")
    guess.add_argument("--steps", type=values.above(1), help=STEPS)
    _add_config(guess, "recast", OWN)
    guess.add_argument("--json", action="store_true")
    guess.set_defaults(run=later("commands", "estimate"))

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
    build.set_defaults(run=later("commands", "build"))

    bench = kinds.add_parser(
        "bench",
        help="measure it: ops, steps, whole pipelines, beside rivals and bounds (in a checkout of the repository)",
        add_help=False,
        prefix_chars="\0",  # every word, --help too, is the benchmarks' own
    )
    bench.add_argument("arguments", nargs="*")
    bench.set_defaults(run=later("benching", "bench"))

    check = kinds.add_parser("doctor", help="what is installed, and what is possible here")
    check.add_argument("--json", action="store_true")
    check.add_argument(
        "--verify", action="store_true", help="compare every backend with float64 on this device, time them, keep that"
    )
    check.set_defaults(run=later("commands", "diagnose"))
    return top


def _add_builtin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--builtin",
        "--size",
        **values.one_of(vocabulary.BUILTIN),
        default=vocabulary.BUILTIN[0],
        help='built-in model: "small" is trained, 128 x 128 pixels; "large", 512 x 512, and "tiny" have random weights '
        "(default: small)",
    )
    parser.add_argument("--edit", **values.one_of(vocabulary.EDITS), help="of the small model (default: place)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    """A pipeline, which the embedded one may stand in for, and the arguments of its call."""
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
    parser.add_argument(
        "--dtype", **values.one_of(vocabulary.DTYPES), help="default: bfloat16 on CUDA, float32 elsewhere"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--offload", **values.one_of(vocabulary.OFFLOADS), default="none", help="keep the model in the CPU's memory"
    )
    parser.add_argument(
        "--set", action="append", type=values.setting, metavar="NAME=VALUE", help="argument of the pipeline's own call"
    )


def _add_config(parser: argparse.ArgumentParser, preset: str | None, keep: str, default: str = "%(default)s") -> None:
    group = parser.add_argument_group("what is kept")
    group.add_argument("--preset", **values.one_of(vocabulary.PRESETS), default=preset, help=f"default: {default}")
    group.add_argument("--keep", type=values.keep, metavar="R", help=f"{KEEP}; default: {keep}")
    group.add_argument("--task", **values.one_of(vocabulary.TASKS), help=TASK)
    group.add_argument(
        "--select",
        "--rule",
        **values.one_of(vocabulary.SELECTORS) | {"metavar": "RULE"},
        help=f"what ranks the tokens: {', '.join(vocabulary.SELECTORS)} (default: the preset's)",
    )
    execution.add_arguments(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=values.seed, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=values.above(1), default=1, metavar="N", help="runs of each, in turns; times are medians"
    )

"""Arguments that several commands have, each with the same meaning in all of them."""

from __future__ import annotations

import argparse
from typing import Any

from .. import vocabulary
from . import execution, values

__all__ = [
    "OWN", "STEPS", "add_builtin", "add_config", "add_likeness", "add_offload", "add_place", "add_runs", "add_set",
    "add_speedup", "settings",
]  # fmt: skip

KEEP = "mean share of the reference tokens over all steps, a dense one included (25%%, 0.25), or with sparse-context "
KEEP += "tokens of each reference at every step that drops any (256)"
OWN = "recast: 1/16 to 1/4, rising; sparse-context: 10%%; the others keep all"
"""What the presets keep by themselves."""
DEFAULT = f"{vocabulary.DEFAULT_PRESET}; recast where a flag says which tokens are kept, or drops any"
TASK = "kind of edit, which picks rule and guard (default: the preset's)"
STEPS = "denoising steps (default: the pipeline's, 4 of a distilled model)"


def add_builtin(parser: argparse.ArgumentParser) -> None:
    """``--builtin`` and ``--edit``: a pipeline that needs no download."""
    parser.add_argument(
        "--builtin",
        "--size",
        **values.one_of(vocabulary.BUILTIN),
        default=vocabulary.BUILTIN[0],
        help='built-in model: "small" is trained, 128 x 128 pixels; "large", 512 x 512, and "tiny" have random weights '
        "(default: small)",
    )
    parser.add_argument("--edit", **values.one_of(vocabulary.EDITS), help="of the small model (default: place)")


def add_place(place: argparse._ActionsContainer, *, half: str = "on CUDA", device: str = "") -> None:
    """``--dtype`` and ``--device``.

    Parameters
    ----------
    place : parser or group
    half : str
        Where bfloat16 is the default, in words.
    device : str
        Added to the words on the default device.
    """
    place.add_argument(
        "--dtype", **values.one_of(vocabulary.DTYPES), help=f"default: bfloat16 {half}, float32 elsewhere"
    )
    place.add_argument("--device", help=f"default: cuda where there is one, else cpu{device}")


def add_offload(place: argparse._ActionsContainer) -> None:
    """``--offload``."""
    place.add_argument(
        "--offload", **values.one_of(vocabulary.OFFLOADS), default="none", help="keep the model in the CPU's memory"
    )


def add_set(place: argparse._ActionsContainer, words: str = "argument of the pipeline's own call") -> None:
    """``--set``: what else a pipeline's call takes."""
    place.add_argument("--set", action="append", type=values.setting, metavar="NAME=VALUE", help=words)


def add_likeness(place: argparse._ActionsContainer, clip: str) -> None:
    """``--clip`` and ``--dino``: folders of the models that judge pictures; `clip` is what the first adds."""
    place.add_argument("--clip", metavar="PATH", help=f"folder of a CLIP model: adds {clip}")
    place.add_argument("--dino", metavar="PATH", help="folder of a DINO or DINOv2 model: adds its similarity")


def add_config(parser: argparse.ArgumentParser, keep: str = OWN, default: str = DEFAULT) -> None:
    """What is kept, and where the saving happens.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    keep : str
        How much is kept by default, in words.
    default : str
        The default preset in words.
    """
    group = parser.add_argument_group("what is kept")
    group.add_argument("--preset", **values.one_of(vocabulary.PRESETS), help=f"default: {default}")
    group.add_argument("--keep", type=values.keep, metavar="R", help=f"{KEEP}; default: {keep}")
    group.add_argument("--task", **values.one_of(vocabulary.TASKS), help=TASK)
    group.add_argument(
        "--select",
        "--rule",
        type=values.selector,
        metavar="RULE",
        help=f"what ranks the tokens: {', '.join(vocabulary.SELECTORS)}, or the .safetensors file of sra train "
        "--selector; learned alone is the small model's (default: the preset's)",
    )
    execution.add_arguments(parser)


def add_speedup(parser: argparse.ArgumentParser) -> None:
    """``--speedup``: a setting that is chosen for a speed, in place of a preset."""
    parser.add_argument(
        "--speedup",
        type=values.at_least_one,
        metavar="X",
        help="take the setting that loses least on the small model of those that save so much work (1.5: a third of "
        "it), in place of a preset",
    )


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a preset that `add_config` read, beside how much it keeps; those that were given."""
    given = {name: value for name in ("task", "select") if (value := getattr(options, name)) is not None}
    return given | execution.settings(options)


def add_runs(parser: argparse.ArgumentParser) -> None:
    """``--seed`` and ``--repeats`` of what is run side by side."""
    parser.add_argument("--seed", type=values.seed, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=values.above(1), default=1, metavar="N", help="runs of each, in turns; times are medians"
    )

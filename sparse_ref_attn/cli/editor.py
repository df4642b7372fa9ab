"""The arguments of ``sra run``."""

from __future__ import annotations

import argparse

from .. import vocabulary
from . import values
from .parsing import later

__all__ = ["add_run"]


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser, but for those that say what is kept."""
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="references of one picture; or a folder, whose pictures are edited one by one; or a .jsonl file of edits",
    )
    parser.add_argument("--image", action="append", metavar="IMAGE", help="the same, as sra compare has it")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="what to make; a line of a .jsonl file may say its own")
    parser.add_argument(
        "-o", "--out", required=True, metavar="PATH", help="a .png or .jpg; for many edits the folder they go to"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="PATH", help="directory of save_pretrained, or a hub id (default: the small one that ships)"
    )
    model.add_argument(
        "--lora",
        action="append",
        type=values.lora,
        metavar="PATH[:SCALE]",
        help="file, folder or hub id of a LoRA; repeat for several (default scale: 1)",
    )
    model.add_argument(
        "--quantize",
        **values.one_of(vocabulary.QUANTIZATIONS),
        help="the transformer's weights in 8 bits (int8, float8: torchao) or 4 (nf4: bitsandbytes)",
    )
    model.add_argument(
        "--dtype",
        **values.one_of(vocabulary.DTYPES),
        help="default: bfloat16 on CUDA and with --quantize, float32 elsewhere",
    )
    model.add_argument("--device", help="default: cuda where there is one, else cpu")
    model.add_argument(
        "--offload", **values.one_of(vocabulary.OFFLOADS), default="none", help="keep the model in the CPU's memory"
    )
    picture = parser.add_argument_group("picture", "default: the pipeline's own")
    picture.add_argument("--negative", metavar="TEXT", help="what not to make, where the pipeline takes it")
    picture.add_argument(
        "--guidance",
        type=values.at_least_zero,
        metavar="X",
        help="how strongly the prompt counts (guidance_scale, or true_cfg_scale of Qwen-Image-Edit)",
    )
    picture.add_argument("--steps", type=values.above(1), metavar="N", help="denoising steps")
    picture.add_argument("--seed", type=values.seed, default=0, metavar="N", help="of the noise (default: 0)")
    picture.add_argument(
        "--num-images",
        type=values.above(1),
        default=1,
        metavar="N",
        help="pictures of one edit, from this seed and those after it: out-1.png, out-2.png, ...",
    )
    picture.add_argument(
        "--width", type=values.above(16), metavar="W", help="in pixels; alone, the height follows the reference's shape"
    )
    picture.add_argument("--height", type=values.above(16), metavar="H")
    picture.add_argument(
        "--set", action="append", type=values.setting, metavar="NAME=VALUE", help="argument of the pipeline's own call"
    )
    told = parser.add_argument_group("what is told")
    told.add_argument("--json", action="store_true", help="a JSON object a picture on stdout, all else on stderr")
    told.add_argument("--quiet", action="store_true", help="errors alone, and what --json asks for")
    told.add_argument(
        "--compare-dense",
        action="store_true",
        help="make each picture with every token too (out-dense.png), and tell both times",
    )
    parser.set_defaults(run=later("editing", "run"))

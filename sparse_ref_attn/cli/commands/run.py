"""The arguments of ``sra run``."""

from __future__ import annotations

import argparse

from ... import vocabulary
from .. import values
from ..common import add_config, add_offload, add_place, add_set, add_speedup
from ..parsing import Commands, later

__all__ = ["add"]

ABOUT = """\
Edits pictures with a diffusers pipeline, computing the reference tokens that
matter alone.

  sra run photo.jpg -p "the cup on a beach" -o out.png --model PATH
  sra run cup.jpg table.jpg -p "the cup on the table" -o out.png --model PATH
  sra run photos/ -p "as a watercolour" -o out/ --model PATH
  sra run edits.jsonl -o out/ --model PATH

Each picture is saved as soon as it exists, and says in its file how it was
made. Of many edits, those that are there already are not made again, and one
that cannot be made does not end the others."""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        help="edit pictures with a model: FLUX.1 Kontext, FLUX.2, Klein, Qwen-Image-Edit, LongCat",
        usage="%(prog)s IMAGE [IMAGE ...] -p TEXT -o PATH [--model PATH] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=ABOUT,
    )
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
    add_place(model, half="on CUDA and with --quantize")
    add_offload(model)
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
    add_set(picture)
    told = parser.add_argument_group("what is told")
    told.add_argument("--json", action="store_true", help="a JSON object a picture on stdout, all else on stderr")
    told.add_argument("--quiet", action="store_true", help="errors alone, and what --json asks for")
    told.add_argument(
        "--compare-dense",
        action="store_true",
        help="make each picture with every token too (out-dense.png), and tell both times",
    )
    add_config(parser)
    add_speedup(parser)
    parser.set_defaults(run=later("editing", "run", "diffusers"))

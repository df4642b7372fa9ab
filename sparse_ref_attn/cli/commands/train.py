"""The arguments of ``sra train``."""

from __future__ import annotations

from ... import vocabulary
from ...isolation import PERS
from .. import values
from ..parsing import Commands, later

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="train the small model, a LoRA of a real one, with or without dropping reference tokens, or a selector",
        description="Flow matching on (reference, prompt, target), resumable bit for bit; several processes under "
        "accelerate launch. A LoRA of FLUX.1 Kontext on a folder of pairs, or the small model on its procedural task.",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoints, log.csv, the trained weights")
    parser.add_argument("--steps", required=True, type=values.above(1), help="in all; a run that was stopped goes on")
    data = parser.add_argument_group("data, one of")
    data.add_argument("--sprites", metavar="DIR", help="transparent pictures: the small model on the procedural task")
    data.add_argument("--data", metavar="DIR", help="pictures and metadata.jsonl, for --model")
    data.add_argument(
        "--selector",
        action="store_true",
        help="train a selector instead: it tells from a reference alone which of its tokens the model will look at. "
        "--steps are then the batches whose attention is measured; --init names the small model's weights (default: "
        "those that ship)",
    )
    data.add_argument("--vae", action="store_true", help="with --sprites: the small model's autoencoder instead")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="PATH", help="a FLUX.1 Kontext or LongCat-Image-Edit pipeline, which gets a LoRA"
    )
    model.add_argument(
        "--lora-rank",
        type=values.above(1),
        metavar="R",
        help="default: 16; with --sprites, a LoRA is trained in place of all weights, and added to them at the end",
    )
    model.add_argument(
        "--init",
        metavar="DIR",
        help="begin from another run's moving average, or from a transformer's folder, with --sprites",
    )
    drop = parser.add_argument_group("random dropping of reference tokens, and references by themselves")
    drop.add_argument(
        "--keep", type=values.shares, metavar="LO-HI", help="shares kept, such as 5%%-100%%; default: no dropping"
    )
    drop.add_argument("--keep-distribution", **values.one_of(vocabulary.DISTRIBUTIONS), default="uniform")
    drop.add_argument(
        "--full", type=float, default=0.1, metavar="P", help="share of steps that keep all (default: 0.1)"
    )
    drop.add_argument(
        "--isolate",
        **values.one_of(PERS),
        nargs="?",
        const="all",
        help="let references run by themselves, all together or each alone (reference), so that they are computed once "
        "at inference; with --keep a share of their keys and values is read. The weights say so, and are run so",
    )
    how = parser.add_argument_group("settings")
    how.add_argument(
        "--batch", type=values.above(1), default=24, help="pairs a step and process (default: %(default)s)"
    )
    how.add_argument("--grid", type=int, choices=(8, 16), default=16, help="tokens along a side, with --sprites")
    how.add_argument("--side", type=values.above(16), default=512, help="pixels, with --data (default: %(default)s)")
    how.add_argument("--text-tokens", type=values.above(1), default=512, help="with --data (default: %(default)s)")
    how.add_argument("--lr", type=float, help="of AdamW (default: 0.002; LoRA 0.0001; autoencoder 0.0025)")
    how.add_argument("--muon-lr", type=float, help="of Muon, for the blocks' matrices (default: 0.004; LoRA none)")
    how.add_argument("--warmup", type=values.above(0), default=100, help="steps (default: %(default)s)")
    how.add_argument("--decay", type=values.above(0), default=0, help="last steps, over which the rates fall to 0")
    how.add_argument("--ema", type=float, default=0.998, help="default: %(default)s")
    how.add_argument(
        "--reference-loss",
        type=float,
        metavar="W",
        help="weight of the loss at the reference rows, with --sprites; with and without --keep (default: 0.1); "
        "no gradient comes of it with --isolate",
    )
    how.add_argument(
        "--distill",
        type=float,
        default=0.0,
        metavar="P",
        help="share of what is learned that the model itself predicted before, from every reference token, and not the "
        "right answer (default: %(default)s)",
    )
    how.add_argument(
        "--open-scenery",
        type=float,
        metavar="P",
        help="share of the placed subjects whose scenery the prompt leaves open, with --sprites (default: 0)",
    )
    how.add_argument(
        "--blocks",
        type=values.blocks,
        metavar="B",
        help="with --selector: whose attention is learned: single, double, all or numbers such as 2,4 "
        "(default: single)",
    )
    how.add_argument(
        "--updates", type=values.above(1), metavar="N", help="of the head, with --selector (default: 3000)"
    )
    how.add_argument("--precision", **values.one_of(("bf16", "no")), default="bf16", help="default: %(default)s")
    how.add_argument("--checkpoint-every", type=values.above(1), default=200, metavar="N", help="default: %(default)s")
    how.add_argument("--seed", type=values.seed, default=0)
    parser.set_defaults(run=later("training", "train", "diffusers", "train"))

"""Verdicts on the usual kinds of call, one after another: what ``sra doctor --verify`` prints."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .dispatch import verdict_of
from .judge import Verdict
from .kind import Kind

__all__ = ["usual_kinds", "verify"]

CHANNELS = (64, 128)
SIZES = {"cuda": (4096, 4096, 1024), "cpu": (256, 256, 128)}  # queries, dense keys, kept rows
TILES = (16, 64)  # queries of a tile
HEADS = 24


def usual_kinds(device: torch.device) -> list[Kind]:
    """Every op and form, with and without gradients, one item and several, in the dtypes that models run in."""
    queries, keys, kept = SIZES.get(device.type, SIZES["cpu"])
    half = [torch.bfloat16, torch.float16] if device.type == "cuda" else [torch.bfloat16, torch.float32]
    kinds = [
        Kind("gather_attention", form, device, dtype, HEADS, HEADS, channels, gradients, several, (queries, keys, rows))
        for form, rows in (("dense", 0), ("gathered", kept), ("per head", kept))
        for channels in CHANNELS
        for dtype in half
        for gradients in (False, True)
        for several in (False, True)
    ]
    kinds += [
        Kind(
            "gather_attention", "tiles", device, dtype, HEADS, HEADS, channels, False, False,
            (queries, keys, kept // 2, tile),
        )
        for tile in TILES
        for channels in CHANNELS
        for dtype in half
    ]  # fmt: skip
    kinds += [
        Kind("attention_mass", form, device, dtype, HEADS, HEADS, channels, False, False, (queries, 2 * keys, keys))
        for form in ("LSE given", "LSE computed", "LSE given, per tile", "LSE computed, per tile")
        for channels in CHANNELS
        for dtype in half
    ]
    return kinds + [
        Kind("pack_rows", form, device, half[0], several=several, size=(2 * keys, keys, 256 << several))
        for form in ("pack", "unpack")
        for several in (False, True)
    ]


def verify(device: torch.device) -> Iterator[tuple[Kind, Verdict]]:
    """The usual kinds with verdicts got now, which take the place of earlier ones."""
    for kind in usual_kinds(device):
        yield kind, verdict_of(kind, again=True)

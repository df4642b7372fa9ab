"""What a run that found no memory could do with less."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..config import SparseRef
from ..errors import SparseRefError
from ..estimation import estimate
from ..execution import Cache
from ..hooks.compiled import unwrap
from ..vocabulary import OFFLOADS

__all__ = ["memory_of"]


def memory_of(
    pipe: Any, config: SparseRef, arguments: dict[str, Any], options: argparse.Namespace
) -> Callable[[], str]:
    """The words, made only where they are needed: flags, the reference cache's bytes and the resolution."""

    def words() -> str:
        found = []
        for offload in OFFLOADS[OFFLOADS.index(getattr(options, "offload", OFFLOADS[-1])) + 1 :]:
            found.append(f"--offload {offload} keeps weights in the CPU's memory")
        if getattr(options, "quantize", "") is None:
            found.append("--quantize int8 halves the transformer's weights")
        images = arguments["image"] if isinstance(arguments["image"], list) else [arguments["image"]]
        height, width = arguments.get("height"), arguments.get("width")
        if isinstance(config.execute, Cache):
            found.append(_cache(pipe, config, images, (width or 1024, height or 1024)))
        pixels = f"{width} x {height} pixels" if width and height else "the pipeline's own size"
        given = ", ".join(f"{image.width} x {image.height}" for image in images)
        found.append(
            f"a smaller --width and --height (now {pixels}) or fewer and smaller images (now {given}) need less"
        )
        return "; ".join(["", *(part for part in found if part)])

    return words


def _cache(pipe: Any, config: SparseRef, images: list[Any], output: tuple[int, int]) -> str:
    with suppress(SparseRefError):
        memory = estimate(
            unwrap(pipe.transformer), references=[image.size for image in images], output=output, config=config, steps=4
        ).memory
        rows, beside = memory.sparse_reference_kv, memory.room
        if memory.tiles is not None:
            rows, beside = memory.dense_reference_kv, memory.tiles
        held, whole = (rows + beside) / 1e9, memory.dense_reference_kv / 1e9
        part = memory.sparse_reference_kv < memory.dense_reference_kv
        less = "less with a smaller --keep and --cache-rows budget, " if part else ""
        return (
            f"the reference cache holds {held:.1f} GB (all tokens: {whole:.1f} GB), {less}none with --preset "
            "sparse-context or recast, which drop tokens"
        )
    return ""

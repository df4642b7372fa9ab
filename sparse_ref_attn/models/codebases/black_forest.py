"""FLUX.1 and FLUX.2 as Black Forest Labs' repositories call them, which trainers keep."""

from __future__ import annotations

from ...adapters import PlainAdapter, references_from_ids

__all__ = ["FLUX", "FLUX2"]

FLUX = PlainAdapter(
    tokens="img",
    rows={"img_ids": 1},
    find=lambda kwargs: references_from_ids(kwargs["img_ids"]),
    text="txt",
    attention=["double"] * 19 + ["single"] * 38,
    positions="img_ids",
    name="FLUX.1",
)

FLUX2 = PlainAdapter(
    tokens="x",
    rows={"x_ids": 1},
    find=lambda kwargs: references_from_ids(kwargs["x_ids"]),
    text="ctx",
    positions="x_ids",
    name="FLUX.2",
)

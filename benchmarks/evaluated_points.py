"""What dropping tokens loses, as points of the frontier, from the evaluation of the page about quality."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

from sparse_ref_attn.candidates import CANDIDATES
from sparse_ref_attn.eval.aggregate import paired
from sparse_ref_attn.eval.rows import read_rows
from sparse_ref_attn.frontier import Point
from sparse_ref_attn.source import source

from .results import RESULTS

__all__ = ["EVALUATED", "evaluated_points"]

EVALUATED: Mapping[str, tuple[str, str]] = {
    "mass-50": ("ReCAST flat", "0.5"),
    "mass-25": ("ReCAST flat", "0.25"),
    "mass-10": ("ReCAST flat", "0.1"),
    "saliency-50": ("saliency", "0.5"),
    "saliency-25": ("saliency", "0.25"),
    "edges-25": ("edges", "0.25"),
    "downscaled-25": ("downscaled", "0.25"),
}
"""Methods and shares of the evaluation that are candidates."""
GROUPS = (("subject-driven", 1), ("subject-driven", 2), ("aligned", 1))
"""Kinds of edit and numbers of references."""
SUBJECT, PICTURE = "subject PSNR (dB) vs target", "PSNR (dB) vs dense"


def evaluated_points(folder: Path = RESULTS / "eval") -> Iterator[Point]:
    """The points of `EVALUATED`, in all steps of the evaluation, on the weights that were trained dense."""
    about = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    steps, weights = about["settings"]["steps"], about["models"]["dense"]["id"]
    rows = [row for row in read_rows(folder)[1] if row["model"] == "dense" and row[SUBJECT]]
    for key, (method, keep) in EVALUATED.items():
        for family, references in GROUPS:
            pairs = [row for row in rows if row["example"].startswith("pair/") == (references == 2)]
            edits = [row for row in pairs if row["family"] == family]
            loss = paired(edits, SUBJECT, ("dense", family, method, keep), ("dense", family, "dense", "1.0"))
            own = [row for row in edits if (row["method"], row["keep"]) == (method, keep)]
            yield Point(
                setting=key,
                code=f"sra.patch(pipe, {source(CANDIDATES[key])})",
                family=family,
                references=references,
                base_steps=steps,
                steps=steps,
                loss_db=round(loss.mean, 3),
                low=round(loss.low, 3),
                high=round(loss.high, 3),
                dense_db=round(fmean(float(row[PICTURE]) for row in own if row[PICTURE]), 2),
                examples=len({row["example"] for row in own}),
                seeds=len({row["seed"] for row in own}),
                weights=weights,
            )

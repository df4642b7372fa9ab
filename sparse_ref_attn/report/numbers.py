"""What a finished run kept, took and cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from ..checks import is_number, is_one_of
from ..errors import ConfigError, LayoutError
from ..record import RunRecord, StepRecord, mean_over_blocks
from .stored import stored, tiled
from .words import KINDS, hypertext, markdown, text

__all__ = ["FlopSummary", "summary"]

_WORDS = {"text": text, "markdown": markdown, "html": hypertext}


@dataclass(frozen=True)
class FlopSummary:
    """Work of the transformer over a whole run, and the time it should then take.

    Parameters
    ----------
    dense_tflop : float
        Tera floating point operations with every token in every step, > 0.
    sparse_tflop : float
        The same for the run that was made, profiling and scoring included, > 0.
    bound_seconds : float, optional
        The dense run's attention time and remaining time, each scaled by its own work, > 0.

    Raises
    ------
    ConfigError
        If a number is not finite and above 0.

    Examples
    --------
    >>> FlopSummary(300.0, 120.0).ratio
    2.5
    """

    dense_tflop: float
    sparse_tflop: float
    bound_seconds: float | None = None

    def __post_init__(self) -> None:
        given = [self.dense_tflop, self.sparse_tflop] + [self.bound_seconds] * (self.bound_seconds is not None)
        if not all(number is not None and math.isfinite(number) and number > 0 for number in given):
            raise ConfigError(f"FLOP counts and the bound must be finite and above 0, got {self}")

    @property
    def ratio(self) -> float:
        """Dense work over the work that was done: 2.0 means half the FLOPs."""
        return self.dense_tflop / self.sparse_tflop


@overload
def summary(
    record: RunRecord,
    format: Literal["text", "markdown", "html", "json"] = "text",
    flops: FlopSummary | None = None,
    dense_seconds: float | None = None,
) -> str: ...


@overload
def summary(
    record: RunRecord,
    format: Literal["dict"],
    flops: FlopSummary | None = None,
    dense_seconds: float | None = None,
) -> dict[str, Any]: ...


def summary(
    record: RunRecord,
    format: str = "text",
    flops: FlopSummary | None = None,
    dense_seconds: float | None = None,
) -> str | dict[str, Any]:
    """What one run kept, how long it took, and what it was bound to take.

    Only what was measured is reported: anything else is "-" in the tables and None in the dict.

    Parameters
    ----------
    record : RunRecord
        A finished run.
    format : {"text", "markdown", "html", "dict", "json"}
        A table of at most 100 columns, markdown or HTML tables, JSON types, or those as JSON text.
    flops : FlopSummary, optional
        Work of the dense run and of this one.
    dense_seconds : float, optional
        Transformer seconds of the same run with every token, measured as this one was
        (``summary(dense_run, "dict")["seconds"]["total"]``), > 0.

    Returns
    -------
    str or dict
        The dict has the keys "references" (per reference: number from 1, grid, tokens, kept_min, kept_mean,
        kept_max, mass_kept), "steps", "reference_tokens", "seconds", "host_ms_per_step", "speedup",
        "flops", "cache" (bytes of the reference K/V held between steps, their exactness, and how far they had moved at
        each full step after the first, median and worst of the layers; None without), "tiles" (how many
        tiles of the generation read tokens of their own, their side, and cells whose means stand for the rest; None
        without), "stability" (one entry each time the run ranked again), "by_step", "batch", "notes" and "config".
        Kept counts are over all steps, where dense and profile steps count as all tokens, and a step whose dropped
        tokens leave by depth as the mean over its blocks.
        ``mass_kept`` is the share, in [0, 1], of the profiled mass that the kept tokens hold, mean over the steps that
        drop any. ``speedup["sparse_step"]`` compares with dense steps only: a profile step also measures.

    Raises
    ------
    LayoutError
        If no step was run, or selections and masses do not fit the references.
    ConfigError
        If the format is unknown or `dense_seconds` is not above 0.

    Notes
    -----
    Reads every step's clock and selection once, which may sync with the device.

    Examples
    --------
    >>> import torch
    >>> from sparse_ref_attn.record import RunRecord, StepRecord
    >>> from sparse_ref_attn.types import Reference, RefSelection, TokenLayout
    >>> layout = TokenLayout(8, 0, (0, 4), (Reference(4, 4, (2, 2)),))
    >>> run = RunRecord(layout, 1, 2)
    >>> third = RefSelection(torch.tensor([2]), (4,))
    >>> run.steps = [StepRecord(0, "profile", 4), StepRecord(1, "sparse", 1, selection=third)]
    >>> summary(run, "dict")["references"][0]["kept_mean"]
    2.5
    """
    if not is_one_of(format, (*_WORDS, "dict", "json")):
        raise ConfigError(f"format must be one of {', '.join((*_WORDS, 'dict', 'json'))}, got {format!r}")
    if dense_seconds is not None and not (is_number(dense_seconds) and 0 < dense_seconds < math.inf):
        raise ConfigError(f"dense_seconds must be finite and above 0, got {dense_seconds!r}")
    if not record.steps or not record.layout.references:
        raise LayoutError(
            f"a report needs a finished run with references, got {len(record.steps)} steps "
            f"and {len(record.layout.references)} references: call the pipeline first"
        )
    data = _measure(record, flops, dense_seconds)
    if format == "dict":
        return data
    if format == "json":
        return json.dumps(data, indent=2, allow_nan=False)
    return _WORDS[format](data)


def _measure(record: RunRecord, flops: FlopSummary | None, dense_seconds: float | None) -> dict[str, Any]:
    steps, everything = record.steps, record.layout.reference_tokens
    seconds = [_measured(step.seconds()) for step in steps]
    per_kind = {kind: [s for s, step in zip(seconds, steps, strict=True) if step.kind == kind] for kind in KINDS}
    mean_seconds = {kind: _mean(per_kind[kind]) for kind in KINDS}
    total = sum(s for s in seconds if s is not None) if None not in seconds else None
    mean_kept = sum(record.mean_kept(step) for step in steps) / len(steps)
    host = sum(step.host_seconds for step in steps)
    kinds = Counter(step.kind for step in steps)
    work = None
    if flops is not None:
        work = {
            "dense_tflop": flops.dense_tflop,
            "sparse_tflop": flops.sparse_tflop,
            "ratio": flops.ratio,
            "bound_seconds": flops.bound_seconds,
            "bound_speedup": _ratio(dense_seconds, flops.bound_seconds),
            "measured_over_bound": _ratio(flops.bound_seconds, total),
        }
    return {
        "references": _references(record),
        "steps": {"planned": record.total_steps, "ran": len(steps), **{kind: kinds[kind] for kind in KINDS}},
        "reference_tokens": {"all": everything, "mean_per_step": mean_kept, "share": mean_kept / everything},
        "seconds": {"total": total, **{f"per_{kind}_step": mean_seconds[kind] for kind in KINDS}},
        "host_ms_per_step": 1000 * host / len(steps) if host > 0 else None,
        "speedup": {
            "sparse_step": _ratio(mean_seconds["dense"], mean_seconds[_sparse_kind(record)]),
            "run": _ratio(dense_seconds, total),
            "dense_seconds": dense_seconds,
        },
        "flops": work,
        "cache": stored(record),
        "tiles": tiled(record),
        "stability": [
            {
                "step": entry.step,
                "spearman": [None if math.isnan(rank) else rank for rank in entry.spearman],
                "overlap": entry.overlap,
            }
            for entry in record.stability
        ],
        "by_step": {
            "step": [step.index for step in steps],
            "kind": [step.kind for step in steps],
            "kept": [step.kept for step in steps],
            "from_block": [step.from_block for step in steps],
            "calls": [step.calls for step in steps],
            "means": [step.means for step in steps],
            "cache_bytes": [step.cache_bytes for step in steps],
            "seconds": seconds,
        },
        "batch": record.batch,
        "notes": list(record.notes),
        "config": dict(record.config),
    }


def _sparse_kind(record: RunRecord) -> str:
    """Which steps a run is faster by than by dense ones of its own."""
    return "cached" if record.with_the_picture else "sparse"


def _references(record: RunRecord) -> list[dict[str, Any]]:
    references = record.layout.references
    counts = [_kept(record, step) for step in record.steps]
    shares = _mass_kept(record)
    rows = []
    for i, reference in enumerate(references):
        kept = [count[i] for count in counts if count is not None]
        known = bool(kept) and None not in counts
        rows.append(
            {
                "number": i + 1,
                "grid": list(reference.grid) if reference.grid is not None else None,
                "tokens": reference.length,
                "kept_min": min(kept) if known else None,
                "kept_mean": sum(kept) / len(kept) if known else None,
                "kept_max": max(kept) if known else None,
                "mass_kept": shares[i],
            }
        )
    return rows


def _kept(record: RunRecord, step: StepRecord) -> tuple[float, ...] | None:
    """Tokens of each reference that took part in a step, mean over its blocks; None if unknown (a cached step may not
    say)."""
    sizes = record.layout.sizes
    if step.read is not None:
        return tuple(step.read[:, 0].tolist())
    if step.selection is not None:
        if tuple(step.selection.sizes) != sizes:
            raise LayoutError(
                f"the selection of step {step.index} must be for references of {sizes} tokens, "
                f"got one for {tuple(step.selection.sizes)}"
            )
        counts = zip(step.selection.counts(), sizes, strict=True)
        return tuple(mean_over_blocks(kept, size, step.from_block, record.blocks) for kept, size in counts)
    if step.kept == sum(sizes):
        return sizes
    return (step.kept,) if len(sizes) == 1 else None


def _mass_kept(record: RunRecord) -> list[float | None]:
    """Per reference the mean over in-flight, sparse and cached steps of the kept tokens' share of the mass."""
    sizes = record.layout.sizes
    if record.mass is None:
        return [None] * len(sizes)
    if tuple(m.shape[0] for m in record.mass) != sizes:
        raise LayoutError(f"the mass must have {sizes} entries, got {tuple(m.shape[0] for m in record.mass)}")
    mass = [m.detach().double().cpu() for m in record.mass]
    shares: list[list[float | None]] = [[] for _ in sizes]
    for step in record.steps:
        if step.kind not in ("in_flight", "sparse", "cached"):
            continue
        if step.read is not None:
            for row, share in zip(shares, step.read[:, 1].tolist(), strict=True):
                row.append(share)
            continue
        if step.selection is None:
            for row in shares:
                row.append(1.0 if step.kept == sum(sizes) else None)
            continue
        for row, m, kept in zip(shares, mass, step.selection.split(), strict=True):
            row.append(_ratio(float(m[kept.cpu()].sum()), float(m.sum())))
    return [_mean(row) if None not in row else None for row in shares]


def _measured(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _ratio(above: float | None, below: float | None) -> float | None:
    if above is None or not below or not math.isfinite(above / below):
        return None
    return above / below

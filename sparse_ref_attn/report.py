"""What a finished run did, in numbers: the summary and the attention diagnostics."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from torch import Tensor

from .checks import is_number, is_one_of
from .errors import ConfigError, LayoutError
from .record import RunRecord, StepRecord, mean_over_blocks

__all__ = ["FlopSummary", "attention_table", "summary"]

KINDS = ("profile", "in_flight", "dense", "sparse", "cached")
WIDTH = 100  # columns of the text form


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
    format: Literal["text", "markdown", "json"] = "text",
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
    format : {"text", "markdown", "dict", "json"}
        A table of at most 100 columns, markdown tables, JSON types, or those as JSON text.
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
        "flops", "cache" (bytes of the reference K/V held between steps; None without), "stability" (one entry
        each time the run ranked again), "by_step", "batch", "notes" and "config". Kept counts are over all steps, where
        dense and profile steps count as all tokens, and a step whose dropped tokens leave by depth as the mean over
        its blocks. ``mass_kept`` is the share, in [0, 1], of the
        profiled mass that the kept tokens hold, mean over the steps that drop any.
        ``speedup["sparse_step"]`` compares with dense steps only: a profile step also measures.

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
    if not is_one_of(format, ("text", "markdown", "dict", "json")):
        raise ConfigError(f'format must be "text", "markdown", "dict" or "json", got {format!r}')
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
    return _text(data) if format == "text" else _markdown(data)


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
            "sparse_step": _ratio(mean_seconds["dense"], mean_seconds["sparse"]),
            "run": _ratio(dense_seconds, total),
            "dense_seconds": dense_seconds,
        },
        "flops": work,
        "cache": _cache(record),
        "stability": [
            {"step": entry.step, "spearman": list(entry.spearman), "overlap": entry.overlap}
            for entry in record.stability
        ],
        "by_step": {
            "step": [step.index for step in steps],
            "kind": [step.kind for step in steps],
            "kept": [step.kept for step in steps],
            "from_block": [step.from_block for step in steps],
            "calls": [step.calls for step in steps],
            "cache_bytes": [step.cache_bytes for step in steps],
            "seconds": seconds,
        },
        "batch": record.batch,
        "notes": list(record.notes),
        "config": dict(record.config),
    }


def _cache(record: RunRecord) -> dict[str, int] | None:
    """Bytes of the reference K/V held between steps, and of the model's own cache of every token; None without one."""
    if not record.dense_cache_bytes:
        return None
    held = [step.cache_bytes for step in record.steps]
    return {"dense_bytes": record.dense_cache_bytes, "peak_bytes": max(held), "last_bytes": held[-1]}


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
        if step.selection is None:
            for row in shares:
                row.append(1.0 if step.kept == sum(sizes) else None)
            continue
        for row, m, kept in zip(shares, mass, step.selection.split(), strict=True):
            row.append(_ratio(float(m[kept.cpu()].sum()), float(m.sum())))
    return [_mean(row) if None not in row else None for row in shares]


def _text(data: dict[str, Any]) -> str:
    lines = ["Reference tokens kept (over all steps; dense and profile steps count as all tokens)"]
    lines += ["  " + line for line in _aligned(*_kept_rows(data), left=(1,))]
    lines += ["", "Run"]
    facts = _facts(data)
    indent = max(len(name) for name, _ in facts) + 4
    for name, value in facts:
        lines += textwrap.wrap(f"  {name:<{indent - 2}}{value}", WIDTH, subsequent_indent=" " * indent)
    if data["notes"]:
        lines += ["", "Notes"]
        for note in data["notes"]:
            lines += textwrap.wrap(note, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def _markdown(data: dict[str, Any]) -> str:
    header, rows = _kept_rows(data)
    lines = ["| " + " | ".join(header) + " |", "|---:|:---|" + "---:|" * (len(header) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "Kept tokens are over all steps; dense and profile steps count as all tokens.", ""]
    lines += ["| run | |", "|:---|:---|", *(f"| {name} | {value} |" for name, value in _facts(data))]
    if data["notes"]:
        lines += ["", *(f"- {' '.join(note.split())}" for note in data["notes"])]
    return "\n".join(lines)


def _kept_rows(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in data["references"]:
        tokens = row["tokens"]
        kept = [row[key] for key in ("kept_min", "kept_mean", "kept_max")]
        grid = "{} x {}".format(*row["grid"]) if row["grid"] else "-"
        cells = ["-" if k is None else f"{_count(k)} ({_percent(k / tokens)})" for k in kept]
        mass = row["mass_kept"]
        rows.append([str(row["number"]), grid, _count(tokens), *cells, "-" if mass is None else _percent(mass)])
    return ["reference", "grid", "tokens", "min", "mean", "max", "mass kept"], rows


def _facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    steps, tokens, seconds = data["steps"], data["reference_tokens"], data["seconds"]
    kinds = [kind for kind in KINDS if steps[kind]]
    ran = f"{steps['ran']}" if steps["ran"] == steps["planned"] else f"{steps['ran']} of {steps['planned']} planned"
    each = ", ".join(f"{_word(kind)} {_time(seconds[f'per_{kind}_step'])}" for kind in kinds)
    speed, work = data["speedup"], data["flops"]
    mean = f"{_count(tokens['mean_per_step'])} of {_count(tokens['all'])} ({_percent(tokens['share'])})"
    rows = [
        ("steps", f"{ran}: " + ", ".join(f"{steps[kind]} {_word(kind)}" for kind in kinds)),
        ("reference tokens per step", f"{mean}, mean over all steps"),
        ("transformer time per step", each),
        ("transformer time, whole run", _time(seconds["total"])),
        ("speed-up of a sparse step", _times(speed["sparse_step"], " over a dense step")),
        ("speed-up of the whole run", _times(speed["run"], f" over {_time(speed['dense_seconds'])} dense")),
    ]
    if work is None:
        rows += [("FLOP ratio", "-"), ("bound", "-")]
    else:
        flop = f" ({work['dense_tflop']:,.4g} TFLOP dense, {work['sparse_tflop']:,.4g} in this run)"
        rows.append(("FLOP ratio", _times(work["ratio"], flop)))
        bound = [_time(work["bound_seconds"])]
        if work["bound_speedup"] is not None:
            bound.append(f"{work['bound_speedup']:.2f}x over dense")
        if work["measured_over_bound"] is not None:
            bound.append(f"measured speed is {work['measured_over_bound']:.2f} of the bound's")
        rows.append(("bound", ", ".join(bound)))
    held, again = data["cache"], data["stability"]
    if held is not None:
        sizes = [_bytes(held[key]) for key in ("peak_bytes", "last_bytes", "dense_bytes")]
        rows.append(
            ("reference K/V held", f"{sizes[0]} at most, {sizes[1]} in the last step, {sizes[2]} with every token")
        )
    if again:
        ranks = [r for entry in again for r in entry["spearman"]]
        rows.append(
            (
                "ranked again",
                f"in step {', '.join(str(entry['step']) for entry in again)}: rank correlation {min(ranks):.2f} to "
                f"{max(ranks):.2f}, {_percent(min(entry['overlap'] for entry in again))} or more of the kept stayed",
            )
        )
    host = data["host_ms_per_step"]
    rows.append(("library host time per step", "-" if host is None else f"{host:.3g} ms"))
    return rows


def _word(kind: str) -> str:
    return kind.replace("_", " ")


def attention_table(record: RunRecord) -> dict[str, Any]:
    """How concentrated the generation's attention to the references was (ReCAST's diagnostics).

    Parameters
    ----------
    record : RunRecord
        A run with at least one profiled step.

    Returns
    -------
    dict
        "by_step", "by_reference", "by_block", "by_head" (block and head) and "each" (step, block,
        reference and head): dicts of lists of equal length, with the keys they are by and
        "top_quarter" (share of a reference's mass in its top 25 % tokens, in [0.25, 1]),
        "entropy" (bits, in [0, log2 of the reference's tokens]) and "mass" (attention paid to one
        reference, in [0, 1]), each a mean; None where it was not finite. "by_reference" also has
        "entropy_uniform", the entropy of an even spread. References count from 1, the rest from 0.
        "text": the means by step and by block as a short table.

    Raises
    ------
    ConfigError
        If no attention was measured.

    Examples
    --------
    >>> import torch
    >>> from sparse_ref_attn.record import BlockAttention, RunRecord
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> run = RunRecord(TokenLayout(8, 0, (0, 4), (Reference(4, 4),)), 1, 2)
    >>> one = torch.tensor([[0.25, 0.75]])  # one reference, two heads
    >>> run.attention = [BlockAttention(0, 0, mass=one, entropy=one, top_quarter=one)]
    >>> attention_table(run)["by_step"]
    {'step': [0], 'top_quarter': [0.5], 'entropy': [0.5], 'mass': [0.5]}
    """
    if not record.attention:
        raise ConfigError(
            "attention diagnostics need a run with a profiling step (a selector that measures attention), "
            f"got {len(record.steps)} steps without one"
        )
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*_KEYS, *_MEASURES)}
    for entry in record.attention:
        references, heads = np.indices(tuple(entry.mass.shape))
        keys = (np.full_like(heads, entry.step), np.full_like(heads, entry.block), references + 1, heads)
        for name, key in zip(_KEYS, keys, strict=True):
            parts[name].append(key.ravel())
        for name in _MEASURES:
            parts[name].append(_array(getattr(entry, name)).ravel())
    columns = {name: np.concatenate(part) for name, part in parts.items()}
    table: dict[str, Any] = {f"by_{name}": _means(columns, name) for name in ("step", "reference", "block")}
    table["by_head"] = _means(columns, "block", "head")
    table["each"] = _means(columns, *_KEYS)
    sizes = record.layout.sizes
    table["by_reference"]["entropy_uniform"] = [math.log2(sizes[i - 1]) for i in table["by_reference"]["reference"]]
    lines = []
    for name in ("step", "reference", "block"):
        part = table[f"by_{name}"]
        rows = [[str(key), *(_digits(part[m][i]) for m in _MEASURES)] for i, key in enumerate(part[name])]
        lines += [*_aligned([name, "mass in top 25 %", "entropy (bits)", "mass"], rows), ""]
    table["text"] = "\n".join(lines[:-1])
    return table


_KEYS = ("step", "block", "reference", "head")
_MEASURES = ("top_quarter", "entropy", "mass")


def _means(columns: dict[str, np.ndarray], *names: str) -> dict[str, list[Any]]:
    """Mean of every measure over the entries that share the named keys."""
    keys = np.stack([columns[name] for name in names], axis=1)
    groups, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    out: dict[str, list[Any]] = {name: groups[:, i].tolist() for i, name in enumerate(names)}
    for name in _MEASURES:
        fine = np.isfinite(columns[name])
        sums = np.bincount(group[fine], columns[name][fine], len(groups))
        counts = np.bincount(group[fine], minlength=len(groups))
        out[name] = [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]
    return out


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _aligned(header: list[str], rows: list[list[str]], left: Sequence[int] = ()) -> list[str]:
    """A table in columns, a rule below its header; right-aligned but for the columns in `left`."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    pad = [str.ljust if i in left else str.rjust for i in range(len(header))]
    return ["  ".join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)).rstrip() for line in lines]


def _measured(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _ratio(above: float | None, below: float | None) -> float | None:
    if above is None or not below or not math.isfinite(above / below):
        return None
    return above / below


def _count(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens == round(tokens) else f"{tokens:,.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _times(ratio: float | None, rest: str) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x{rest}"

"""A run's numbers as text, as markdown and as HTML."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from .page import page, table

__all__ = ["KINDS", "aligned", "digits", "hypertext", "markdown", "text"]

KINDS = ("profile", "in_flight", "dense", "sparse", "cached")
WIDTH = 100  # columns of the text form


def text(data: dict[str, Any]) -> str:
    lines = ["Reference tokens kept (over all steps; dense and profile steps count as all tokens)"]
    lines += ["  " + line for line in aligned(*_kept_rows(data), left=(1,))]
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


def markdown(data: dict[str, Any]) -> str:
    header, rows = _kept_rows(data)
    lines = ["| " + " | ".join(header) + " |", "|---:|:---|" + "---:|" * (len(header) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "Kept tokens are over all steps; dense and profile steps count as all tokens.", ""]
    lines += ["| run | |", "|:---|:---|", *(f"| {name} | {value} |" for name, value in _facts(data))]
    if data["notes"]:
        lines += ["", *(f"- {' '.join(note.split())}" for note in data["notes"])]
    return "\n".join(lines)


def hypertext(data: dict[str, Any]) -> str:
    kept = table(*_kept_rows(data), left=(1,))
    return page("Reference tokens kept", kept, table((), _facts(data), left=(0, 1)), notes=data["notes"])


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
        rows.append(("stored K/V", _EXACTNESS.get(held["exactness"], "-") + _drift(held["drift"])))
    if data["tiles"] is not None:
        rows.append(("stored K/V read by", _tiles(data["tiles"])))
    if again:
        ranks = [r for entry in again for r in entry["spearman"] if r is not None]
        likeness = f"rank correlation {min(ranks):.2f} to {max(ranks):.2f}" if ranks else "rank correlation undefined"
        rows.append(
            (
                "ranked again",
                f"in step {', '.join(str(entry['step']) for entry in again)}: {likeness}, "
                f"{_percent(min(entry['overlap'] for entry in again))} or more of the kept stayed",
            )
        )
    host = data["host_ms_per_step"]
    rows.append(("library host time per step", "-" if host is None else f"{host:.3g} ms"))
    return rows


_EXACTNESS = {
    "exact": "exact: the references see neither the time nor the generation",
    "fixed time": "drifting: the references have a time of their own, but see the text",
    "drifting": "drifting: the references see the time and the generation",
}


def _drift(moved: list[dict[str, Any]]) -> str:
    """How far keys and values moved from full step to full step, median of the layers (and the worst)."""
    steps = [f"{_moved(each['median'])} (worst {_moved(each['worst'])}) at step {each['step']}" for each in moved]
    return f"; moved by {', '.join(steps)}" if steps else ""


def _tiles(data: dict[str, Any]) -> str:
    """Who reads what, where tiles do."""
    down, across = data["tiles"]
    rest = f"the rest as the means of {data['means']} cells of {data['cell']} x {data['cell']}"
    rest = rest if data["means"] else "nothing of the rest"
    return f"each of {down} x {across} tiles of {data['tile']} x {data['tile']}, in each layer; {rest}"


def _moved(change: float | None) -> str:
    return "-" if change is None else _percent(change)


def _word(kind: str) -> str:
    return kind.replace("_", " ")


def aligned(header: list[str], rows: list[list[str]], left: Sequence[int] = ()) -> list[str]:
    """A table in columns, a rule below its header; right-aligned but for the columns in `left`."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    pad = [str.ljust if i in left else str.rjust for i in range(len(header))]
    return ["  ".join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)).rstrip() for line in lines]


def _count(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens == round(tokens) else f"{tokens:,.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _times(ratio: float | None, rest: str) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x{rest}"

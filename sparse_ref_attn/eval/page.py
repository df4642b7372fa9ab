"""A comparison as files: one HTML page that needs nothing else, and the same table as CSV, JSON and markdown."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..overlay import save_overlay
from .comparison import Comparison
from .metrics import Metric
from .plots import quality_plot

__all__ = ["Row", "rows_of", "write_page"]

Row = dict[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; margin: 2rem auto; max-width: 78rem;
       padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p, li { max-width: 52rem } .quiet { color: #5b6675 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e3e7ec; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #1c2430 }
td.best { font-weight: 600 } .wide { overflow-x: auto }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.2rem }
figure { margin: 0 } img { max-width: 100%; display: block } .grid img { width: 100% }
figcaption { font-size: .85rem; padding-top: .3rem } details { margin: .4rem 0 } summary { cursor: pointer }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem } .plots svg { max-width: 100%; height: auto }
"""


def rows_of(results: Mapping[str, Comparison], metrics: Sequence[Metric]) -> list[Row]:
    """One row a method, dense first: tokens, seconds, bound, and each metric against the dense picture.

    Parameters
    ----------
    results : mapping of str to Comparison
        By method, of `compare_all` with dense runs.
    metrics : sequence of Metric
    """
    first = next(iter(results.values()))
    assert first.dense is not None
    rows: list[Row] = [
        {
            "method": "dense",
            "tokens_a_step": first.handle.record.layout.reference_tokens,
            "seconds": first.dense.whole,
            "speedup": 1.0,
            "bound_seconds": None,
            "bound_speedup": None,
            "measured_over_bound": None,
            "flop_ratio": 1.0,
            **dict.fromkeys(metric.name for metric in metrics),
        }
    ]
    for name, result in results.items():
        record = result.handle.record
        rows.append(
            {
                "method": name,
                "tokens_a_step": sum(record.mean_kept(step) for step in record.steps) / len(record.steps),
                "seconds": result.sparse.whole,
                "speedup": result.speedup,
                "bound_seconds": result.bound_seconds,
                "bound_speedup": result.bound_speedup,
                "measured_over_bound": result.measured_over_bound,
                "flop_ratio": result.flop_ratio,
                **{metric.name: metric(result.sparse_image, result.dense_image) for metric in metrics},
            }
        )
    return rows


def write_page(
    directory: Path,
    results: Mapping[str, Comparison],
    metrics: Sequence[Metric],
    about: Mapping[str, Any],
    *,
    refused: Mapping[str, str] | None = None,
    note: str = "",
) -> list[tuple[str, str]]:
    """Write ``compare.html``, ``compare.csv``, ``compare.json`` and ``compare.md``; which files, and what each is.

    Parameters
    ----------
    directory : Path
    results : mapping of str to Comparison
        By method, with dense runs.
    metrics : sequence of Metric
        Of each picture against the dense one.
    about : mapping
        JSON types: where and how it ran.
    refused : mapping of str to str, optional
        Methods that could not run, and why.
    note : str
        A sentence for the head of the page.
    """
    rows, refused = rows_of(results, metrics), dict(refused or {})
    columns = list(rows[0])
    with (directory / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    data = {"about": dict(about), "rows": rows, "refused": refused}
    data["runs"] = {name: {**result.to_dict(), "run": result.summary("dict")} for name, result in results.items()}
    # JSON knows no infinity, which is the PSNR of equal pictures.
    text = json.dumps(_finite(data), indent=2, allow_nan=False) + "\n"
    (directory / "compare.json").write_text(text, encoding="utf-8")
    (directory / "compare.md").write_text(markdown(rows, metrics) + "\n", encoding="utf-8")
    page = _page(rows, results, metrics, about, refused, note)
    (directory / "compare.html").write_text(page, encoding="utf-8")
    return [
        ("compare.html", "pictures, kept tokens, table and plots in one page"),
        ("compare.csv", "the table"),
        ("compare.json", "the table, every run's report, settings and versions"),
        ("compare.md", "the table, for a README"),
    ]


def markdown(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """The rows as a markdown table."""
    header, cells = _cells(rows, metrics)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def _cells(rows: Sequence[Row], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    header = ["method", "reference tokens a step", "seconds", "speed-up", "bound", "measured / bound"]
    header += [f"{metric.name} {'↑' if metric.higher_is_better else '↓'}" for metric in metrics]
    out = []
    for row in rows:
        cells = [str(row["method"]), f"{row['tokens_a_step']:,.0f}", f"{row['seconds']:.3g}", f"{row['speedup']:.2f}x"]
        cells += [_number(row["bound_speedup"], ".2f", "x"), _number(row["measured_over_bound"], ".2f")]
        out.append(cells + [_number(row[metric.name], ".4g") for metric in metrics])
    return header, out


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _page(
    rows: Sequence[Row],
    results: Mapping[str, Comparison],
    metrics: Sequence[Metric],
    about: Mapping[str, Any],
    refused: Mapping[str, str],
    note: str,
) -> str:
    first = next(iter(results.values()))
    parts = [
        f"<h1>{html.escape(str(about.get('pipeline', 'Comparison')))}</h1>",
        f'<p class="quiet">{html.escape(_where(about))}</p>',
    ]
    if note:
        parts.append(f"<p>{html.escape(note)}</p>")
    pictures = [("dense", first.dense_image)] + [(name, result.sparse_image) for name, result in results.items()]
    parts.append("<h2>Pictures, same seed</h2>" + _figures(pictures, {row["method"]: _caption(row) for row in rows}))
    parts.append("<h2>Table</h2>" + _table(rows, metrics))
    parts.append(
        '<p class="quiet">Metrics compare each picture with the dense one. The bound is the time the run would take if '
        "nothing were lost: the dense run's attention time and the rest of its transformer time, each scaled by its "
        "own work, plus the time outside the transformer. Measured over bound between 0.90 and 1.05 is as it should "
        "be.</p>"
    )
    plots = [quality_plot(rows, metric, over) for metric in metrics for over in ("tokens", "seconds")]
    parts.append("<h2>Quality over tokens and time</h2>" + f'<div class="plots">{"".join(plots)}</div>')
    parts.append("<h2>Which tokens were kept</h2>" + "".join(_kept(name, result) for name, result in results.items()))
    if refused:
        told = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in refused.items())
        parts.append(f"<h2>Could not run</h2><ul>{told}</ul>")
    settings = html.escape(json.dumps(_finite(dict(about)), indent=2))
    parts.append(f"<h2>Settings</h2><details><summary>Everything that was set</summary><pre>{settings}</pre></details>")
    head = f'<meta charset="utf-8"><title>sparse_ref_attn: comparison</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _where(about: Mapping[str, Any]) -> str:
    versions = about.get("versions", {})
    known = [f"{name} {versions[name]}" for name in ("torch", "diffusers") if versions.get(name)]
    given = [about.get("model"), about.get("device"), *known]
    return ", ".join(str(part) for part in given if part)


def _caption(row: Row) -> str:
    if row["method"] == "dense":
        return f"every token, {row['seconds']:.3g} s"
    return f"{row['tokens_a_step']:,.0f} tokens a step, {row['seconds']:.3g} s, {row['speedup']:.2f}x"


def _figures(pictures: Sequence[tuple[str, Any]], captions: Mapping[str, str]) -> str:
    shown = [
        f'<figure><img src="{_inline(image)}" alt="{html.escape(name)}">'
        f'<figcaption><b>{html.escape(name)}</b><br><span class="quiet">{captions[name]}</span></figcaption></figure>'
        for name, image in pictures
    ]
    return f'<div class="grid">{"".join(shown)}</div>'


def _table(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    header, cells = _cells(rows, metrics)
    best = {}
    for place, metric in enumerate(metrics, start=len(header) - len(metrics)):
        values = [row[metric.name] for row in rows[1:]]
        best[place] = (max if metric.higher_is_better else min)(values)
    body = []
    for row, line in zip(rows, cells, strict=True):
        marks = [
            i in best and row["method"] != "dense" and row[metrics[i - len(header) + len(metrics)].name] == best[i]
            for i in range(len(line))
        ]
        tds = [
            f"<td{' class=best' if mark else ''}>{html.escape(cell)}</td>"
            for cell, mark in zip(line, marks, strict=True)
        ]
        body.append(f"<tr>{''.join(tds)}</tr>")
    ths = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    return f'<div class="wide"><table><thead><tr>{ths}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _kept(name: str, result: Comparison) -> str:
    sparse = [step for step in result.handle.record.steps if step.kind in ("sparse", "cached")]
    if not sparse:
        return f"<p>{html.escape(name)}: every step ran dense.</p>"
    if all(step.selection is None for step in sparse):
        return f"<p>{html.escape(name)}: changes the tokens instead of choosing among them.</p>"
    buffer = io.BytesIO()
    save_overlay(result.handle.record, buffer)
    picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return f'<details><summary>{html.escape(name)}</summary><img src="{picture}" alt="tokens kept by {name}"></details>'


def _inline(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value

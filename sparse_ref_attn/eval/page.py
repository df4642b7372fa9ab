"""A comparison as files: one HTML page that needs nothing else, and the same table as CSV, JSON and markdown."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..overlay import overlay
from .comparison import Comparison
from .equal_time import RivalRun, Rivals
from .method_rows import Row, cells, markdown, rows_of
from .metrics import Metric
from .plots import quality_plot
from .reports.document import document
from .reports.writing import write

__all__ = ["Asked", "write_page"]

_STYLE = """
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; margin: 0 auto; max-width: 96rem;
       padding: 1.5rem clamp(1rem, 3vw, 3rem) }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p, li { max-width: 52rem } .quiet { color: #5b6675 }
blockquote { margin: .8rem 0 1.2rem; padding: .2rem 0 .2rem .9rem; border-left: 3px solid #c2410c; font-size: 1.1rem;
             max-width: 52rem; overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e3e7ec; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; padding-left: 0 }
thead th { border-bottom: 2px solid #1c2430; white-space: normal; vertical-align: bottom }
td.best { font-weight: 600 } .wide { overflow-x: auto }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(clamp(9.5rem, 17vw, 16rem), 1fr)); gap: 1.2rem }
figure { margin: 0 } img { max-width: 100%; height: auto; display: block } .grid img { width: 100% }
figcaption { font-size: .85rem; padding-top: .3rem } details { margin: .4rem 0 } summary { cursor: pointer }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem }
.plots svg { width: 100%; height: auto }
"""


@dataclass(frozen=True)
class Asked:
    """What every method was asked for, which the page shows first.

    Parameters
    ----------
    prompt : str
    references : sequence of PIL.Image.Image
        As they were given to the pipeline.
    answer : PIL.Image.Image, optional
        The right answer, where there is one.
    """

    prompt: str
    references: Sequence[Any]
    answer: Any | None = None

    def pictures(self) -> Iterator[tuple[str, Any]]:
        """Each picture by its name: the references, then the answer."""
        for i, picture in enumerate(self.references):
            yield "reference" if len(self.references) == 1 else f"reference {i + 1}", picture
        if self.answer is not None:
            yield "answer", self.answer


def write_page(
    directory: Path,
    results: Mapping[str, Comparison],
    metrics: Sequence[Metric],
    about: Mapping[str, Any],
    asked: Asked,
    *,
    rivals: Rivals | None = None,
    refused: Mapping[str, str] | None = None,
    note: str = "",
    save: Callable[[str, Any], None] | None = None,
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
    asked : Asked
        The prompt, the references and the answer.
    rivals : Rivals, optional
        Fewer steps in no more time, and step caches: drawn beside the methods, and who wins is the page's first line.
    refused : mapping of str to str, optional
        Methods that could not run, and why.
    note : str
        A sentence for the head of the page.
    save : callable of (str, picture), optional
        Given the picture of each method's kept tokens, "kept NAME".
    """
    rows, refused = rows_of(results, metrics, rivals), dict(refused or {})
    columns = list(rows[0])
    with (directory / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    write(directory / "compare.json", document(results, rows, metrics, about, rivals=rivals, refused=refused))
    told = "" if rivals is None else f"{rivals.told()}\n\n"
    (directory / "compare.md").write_text(f"{told}{markdown(rows, metrics)}\n", encoding="utf-8")
    kept = {name: _kept(result) for name, result in results.items()}
    for name, drawn in kept.items():
        if save is not None and not isinstance(drawn, str):
            save(f"kept {name}", drawn)
    page = _page(rows, results, metrics, about, asked, kept, rivals, refused, note)
    (directory / "compare.html").write_text(page, encoding="utf-8")
    return [
        ("compare.html", "prompt, references, pictures, table, plots and kept tokens in one page"),
        ("compare.csv", "the table"),
        ("compare.json", "the table, every run's report, settings and versions"),
        ("compare.md", "the table, for a README"),
    ]


def _page(
    rows: Sequence[Row],
    results: Mapping[str, Comparison],
    metrics: Sequence[Metric],
    about: Mapping[str, Any],
    asked: Asked,
    kept: Mapping[str, Any],
    rivals: Rivals | None,
    refused: Mapping[str, str],
    note: str,
) -> str:
    first = next(iter(results.values()))
    runs = {} if rivals is None else rivals.runs
    captions = {name: _caption(row, results.get(name), runs.get(name)) for row in rows for name in [row["method"]]}
    given = {name: f"{picture.width} x {picture.height} pixels" for name, picture in asked.pictures()}
    given |= {"answer": "what is right"} if asked.answer is not None else {}
    parts = [] if rivals is None else [f"<p><b>{html.escape(rivals.told())}</b></p>"]
    parts += [
        f"<h1>{html.escape(str(about.get('pipeline', 'Comparison')))}: the same edit by {len(results)} methods</h1>",
        f"<blockquote>{html.escape(asked.prompt)}</blockquote>",
        _figures([*asked.pictures(), ("dense", first.dense_image)], given | captions),
        f'<p class="quiet">{html.escape(_where(about))}</p>',
    ]
    if note:
        parts.append(f"<p>{html.escape(note)}</p>")
    drawn = {name: result.sparse_image for name, result in results.items()}
    drawn |= {name: run.image for name, run in runs.items()}
    pictures = [(row["method"], drawn[row["method"]]) for row in rows[1:]]
    parts.append("<h2>Pictures, same seed as the dense one</h2>" + _figures(pictures, captions))
    parts.append("<h2>Table</h2>" + _table(rows, metrics))
    parts.append(
        '<p class="quiet">By time, the longest first. Metrics compare each picture with the dense one. '
        '"Fewer steps in no more time" is the dense pipeline in the most steps that take no longer. The bound is the '
        "time the run would take if nothing were lost: the dense run's attention time and the rest of its transformer "
        "time, each scaled by its own work, plus the time outside the transformer. Measured over bound between 0.90 "
        "and 1.05 is as it should be.</p>"
    )
    plots = [quality_plot(rows, metric, over) for metric in metrics for over in ("tokens", "seconds")]
    parts.append("<h2>Quality over tokens and time</h2>" + f'<div class="plots">{"".join(plots)}</div>')
    parts.append("<h2>Which tokens were kept</h2>" + "".join(_told(name, drawn) for name, drawn in kept.items()))
    if refused:
        told = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in refused.items())
        parts.append(f"<h2>Could not run</h2><ul>{told}</ul>")
    settings = html.escape(json.dumps(dict(about), indent=2))
    parts.append(f"<h2>Settings</h2><details><summary>Everything that was set</summary><pre>{settings}</pre></details>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>sparse_ref_attn: comparison</title><style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _where(about: Mapping[str, Any]) -> str:
    versions = about.get("versions", {})
    known = [f"{name} {versions[name]}" for name in ("torch", "diffusers") if versions.get(name)]
    given = [about.get("model"), about.get("device"), *known]
    return ", ".join(str(part) for part in given if part)


def _caption(row: Row, result: Comparison | None, rival: RivalRun | None) -> str:
    if rival is not None:
        return f"{rival.setting.name}, {row['seconds']:.3g} s, {row['speedup']:.2f}x"
    if result is None:
        return f"every token, {row['seconds']:.3g} s"
    kinds = [step.kind for step in result.handle.record.steps]
    tokens = f"{row['tokens_a_step']:,.0f} tokens a step"
    if "cached" in kinds:
        tokens = f"references run in {len(kinds) - kinds.count('cached')} of {len(kinds)} steps"
    return f"{tokens}, {row['seconds']:.3g} s, {row['speedup']:.2f}x"


def _figures(pictures: Sequence[tuple[str, Any]], captions: Mapping[str, str]) -> str:
    shown = [
        f'<figure><img src="{_inline(image)}" alt="{html.escape(name)}">'
        f'<figcaption><b>{html.escape(name)}</b><br><span class="quiet">{captions[name]}</span></figcaption></figure>'
        for name, image in pictures
    ]
    return f'<div class="grid">{"".join(shown)}</div>'


def _table(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    header, lines = cells(rows, metrics)
    best = {}
    for place, metric in enumerate(metrics, start=len(header) - len(metrics)):
        values = [row[metric.name] for row in rows[1:]]
        best[place] = (max if metric.higher_is_better else min)(values)
    body = []
    for row, line in zip(rows, lines, strict=True):
        marks = [
            i in best and row["method"] != "dense" and row[metrics[i - len(header) + len(metrics)].name] == best[i]
            for i in range(len(line))
        ]
        tds = [
            f"<td{' class=best' if mark else ''}>{html.escape(cell)}</td>"
            for cell, mark in zip(line, marks, strict=True)
        ]
        body.append(f"<tr>{''.join(tds)}</tr>")
    ths = "".join(f"<th>{html.escape(name).replace('-', '&#8209;')}</th>" for name in header)
    return f'<div class="wide"><table><thead><tr>{ths}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _kept(result: Comparison) -> Any:
    """The picture of the tokens that were kept, or why there is none."""
    sparse = [step for step in result.handle.record.steps if step.kind in ("sparse", "cached")]
    if not sparse:
        return "every step ran dense."
    if all(step.selection is None for step in sparse):
        cached = all(step.kind == "cached" for step in sparse)
        return "reads every token." if cached else "changes the tokens instead of choosing among them."
    return overlay(result.handle.record)


def _told(name: str, drawn: Any) -> str:
    name = html.escape(name)
    if isinstance(drawn, str):
        return f"<p>{name}: {drawn}</p>"
    return f'<details><summary>{name}</summary><img src="{_inline(drawn)}" alt="tokens kept by {name}"></details>'


def _inline(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

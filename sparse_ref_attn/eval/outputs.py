"""What `sra demo` leaves behind: pictures, report.json, and the table it prints."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import replacing
from ..record import RunRecord
from ..toy.calls import image
from ..toy.scenes import Scene
from .comparison import Comparison
from .equal_time import Rivals
from .method_rows import rows_of
from .metrics import MaskedPsnr, Psnr
from .panels import Panel, panels
from .reports.document import document
from .reports.writing import write as write_document

__all__ = [
    "Pictures",
    "against_answer",
    "check_name",
    "prepare_directory",
    "table",
    "table_rows",
    "write",
    "write_answer",
]

SPARSE = "sparse"
"""The name of the one sparse run."""
_OF_FILES = (".csv", ".gif", ".html", ".jpeg", ".jpg", ".json", ".md", ".png", ".safetensors", ".tif", ".tiff", ".webp")
REPORT = "report.json"
_OWN = ("dense.png", "sparse.png", "fewer steps.png", "kept.png", "row.png", "references.png", "answer.png", REPORT)
"""What `write` and `write_answer` leave."""


def prepare_directory(path: str | os.PathLike[str]) -> Path:
    """The directory, made if need be.

    Raises
    ------
    ConfigError
        If it is a file or named like one, or cannot be made or written to.
    """
    check_name(path)
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the output must be a directory that can be made, got {path}: {error.strerror}") from error
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"the output must be a directory that can be written to, got {path}")
    return directory


def check_name(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError where an output directory that is not there yet is named like a file: ``result.png``."""
    if Path(path).suffix.lower() in _OF_FILES and not Path(path).is_dir():
        raise ConfigError(f"the output must be a directory, got {path}, which is named like a file")


class Pictures:
    """The pictures of a run, written as soon as each exists.

    Those of a run before it leave the folder with the first, and so does its report.

    Parameters
    ----------
    folder : Path
        Made with the first picture.
    own : sequence of str
        Names that a run before may have left in `folder`, the first of which is no other's: without it nothing is
        removed.
    """

    def __init__(self, folder: Path, own: Sequence[str] = (REPORT, *_OWN)) -> None:
        self.folder, self.written, self._own = folder, list[str](), own

    def __call__(self, name: str, picture: Any) -> None:
        """Write ``NAME.png``; a later one of the name takes its place."""
        if not self.written:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._own and (self.folder / self._own[0]).is_file():
                for old in self._own:
                    (self.folder / old).unlink(missing_ok=True)
        path = self.folder / (re.sub(r"[^\w -]+", "_", name) + ".png")
        with replacing(path) as draft:
            picture.save(draft, format="PNG")
        if path.name not in self.written:
            self.written.append(path.name)


def write(
    directory: Path,
    result: Comparison,
    about: dict[str, Any],
    rivals: Rivals | None = None,
    answer: dict[str, float] | None = None,
) -> list[tuple[str, str]]:
    """Write the pictures and ``report.json``; which files, and what each shows.

    Parameters
    ----------
    directory : Path
    result : Comparison
    about : dict
        As `reports.document` takes it.
    rivals : Rivals, optional
        The dense pipeline in no more time than the sparse run, whose picture is drawn and whose numbers are reported.
    answer : dict of str to float, optional
        Of `against_answer`.
    """
    files, pictures = [], Pictures(directory, ())
    if result.dense_image is not None:
        pictures("dense", result.dense_image)
        files.append(("dense.png", "the picture with every reference token"))
    pictures("sparse", result.sparse_image)
    files.append(("sparse.png", "the picture with the kept ones, same seed"))
    fewer = None if rivals is None else rivals.equal[SPARSE]
    if rivals is not None and fewer is not None and fewer in rivals.runs:
        pictures("fewer steps", rivals.runs[fewer].image)
        files.append(("fewer steps.png", f"the picture with every token in {fewer}, in no more time"))
    kinds = {step.kind for step in result.handle.record.steps}
    if kinds & {"in_flight", "sparse", "cached"}:
        result.handle.save_overlay(directory / "kept.png")
        files.append(("kept.png", "the reference: kept tokens outlined, dropped ones dark; scores; tokens by step"))
    metrics, runs = [Psnr()], {SPARSE: result}
    found = document(runs, rows_of(runs, metrics, rivals), metrics, about, rivals=rivals)
    write_document(directory / REPORT, found if answer is None else {**found, "against_answer": answer})
    files.append((REPORT, "all numbers, settings and versions"))
    return files


def write_answer(directory: Path, references: Any, pair: Scene, result: Comparison) -> list[tuple[str, str]]:
    """Write what the small model was shown and should have made; which files, and what each shows.

    Parameters
    ----------
    directory : Path
    references : PIL.Image.Image
    pair : Scene
    result : Comparison
        Of a run with the dense picture.
    """
    answer = image(pair.target)
    pictures = Pictures(directory, ())
    for name, picture in (
        ("references", references), ("answer", answer), ("row", _row(references, answer, pair, result))
    ):  # fmt: skip
        pictures(name, picture)
    return [
        ("row.png", "side by side: what the model was shown, the answer, dense and sparse with gain and loss"),
        ("references.png", "what the model was shown"),
        ("answer.png", "what the right answer is"),
    ]


def _row(references: Any, answer: Any, pair: Scene, result: Comparison) -> Any:
    """What was shown, the answer, and both pictures with what they cost and how near they come to it."""
    record, near = result.handle.record, against_answer(result, pair)
    every = record.layout.reference_tokens
    shown = [Panel("reference", references, ("what the model is shown",)), Panel("right answer", answer)]
    for name, picture in (("dense", result.dense_image), ("sparse", result.sparse_image)):
        lines = [f"all {every:,} reference tokens" if name == "dense" else _used(record)]
        lines.append(f"subject: {near[f'{name} against the answer, subject']:.1f} dB PSNR")
        if name == "sparse" and result.flop_ratio is not None:
            lines.append(f"{result.flop_ratio:.2f}x less work")
        shown.append(Panel(name, picture, tuple(lines)))
    return panels(shown)


def _used(record: RunRecord) -> str:
    """In how many steps the references ran, where they were stored; else how many of their tokens a step had."""
    if cached := sum(step.kind == "cached" for step in record.steps):
        return f"run in {len(record.steps) - cached} of {len(record.steps)} steps, else read"
    return f"{record.mean_tokens:,.0f} of {record.layout.reference_tokens:,} tokens a step"


def against_answer(result: Comparison, pair: Scene) -> dict[str, float]:
    """PSNR in dB of the pictures and of their subjects against the right answer."""
    answer, found = image(pair.target), {}
    for name, picture in (("dense", result.dense_image), ("sparse", result.sparse_image)):
        if picture is not None:
            found[f"{name} against the answer, subject"] = MaskedPsnr(pair.mask)(picture, answer)
            found[f"{name} against the answer, whole picture"] = Psnr()(picture, answer)
    return found


def table_rows(result: Comparison) -> list[tuple[str, str, str, str]]:
    """The comparison in words, the head first: what, of the dense run, of the sparse one, and the gain.

    Without a dense run, its column and the ratios are "-".
    """
    dense, sparse = result.dense, result.sparse
    tokens = result.handle.record.layout.reference_tokens
    kept = result.handle.record.mean_tokens
    inside = None if dense is None else dense.transformer
    rows: list[tuple[str, str, str, str]] = [
        ("", "dense", "sparse", "gain"),
        ("whole call", _seconds(dense.whole if dense else None), _seconds(sparse.whole), _times(result.speedup)),
        (
            "  inside the transformer",
            _seconds(inside),
            _seconds(sparse.transformer),
            _times(inside / sparse.transformer if inside else None),
        ),
        ("  text encoders, VAE, rest", _seconds(dense.fixed if dense else None), _seconds(sparse.fixed), ""),
        ("reference tokens a step", f"{tokens:,}", f"{kept:,.0f}", f"{100 * kept / tokens:.3g} % kept"),
    ]
    if result.dense_flops is not None and result.sparse_flops is not None:
        full, short = (f"{flops.total / 1e12:,.3g}" for flops in (result.dense_flops, result.sparse_flops))
        rows.append(("transformer work, TFLOP", full, short, f"{_times(result.flop_ratio)} (FLOP ratio)"))
    if result.bound_seconds is not None:
        rows.append(("the bound of the whole call", "", _seconds(result.bound_seconds), _times(result.bound_speedup)))
    return rows


def table(result: Comparison, rivals: Rivals | None = None) -> str:
    """`table_rows` as lines of text, what the measured time over the bound says, and first who wins at equal time."""
    rows = table_rows(result)
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3]]).rstrip()
        for row in rows
    ]
    if rivals is not None:
        lines = [*_at_equal_time(rivals), "", *lines]
    over = result.measured_over_bound
    if over is not None:
        lines += [
            "",
            f"Measured over bound: {over:.2f}. The bound is the dense run's attention time and the rest of its",
            "transformer time, each scaled by its own work, plus the time outside the transformer.",
        ]
        if not 0.90 <= over <= 1.05:
            lines += [
                "Outside 0.90 to 1.05 the times are not to be trusted, or something is slow: calls too short to time,",
                "or a busy machine. Longer runs and --repeats 3 tell.",
            ]
    return "\n".join(lines)


def _at_equal_time(rivals: Rivals) -> list[str]:
    """Whether fewer steps win, and the numbers of both."""
    name, own = rivals.equal[SPARSE], rivals.psnr(SPARSE)
    lines = [rivals.told()]
    if name is not None and name in rivals.runs:
        run = rivals.runs[name]
        lines.append(
            f"In no more time: {name} of {rivals.steps} with every token, {_seconds(run.seconds)}, PSNR to the dense "
            f"picture {rivals.psnr(name):.1f} dB; the sparse run, {_seconds(rivals.methods[SPARSE][0])}, {own:.1f} dB."
        )
    return lines


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"

"""What is given away, and ``sra shared``: what others gave."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..eval import outputs
from ..eval.frontier.figure import REFERENCES, figure
from ..eval.reports.reading import SharedReport, read_shared
from ..eval.reports.scatter import on_frontier, scatter
from ..eval.reports.shareable import shareable
from ..eval.reports.table import as_csv, as_markdown, metrics_of
from ..eval.reports.writing import write
from ..extras import absent, missing, versions
from ..files import fits
from ..frontier import read_points
from ..vocabulary import chosen
from .terminal import saved, show

__all__ = ["check_asked", "share", "shared"]


def check_asked(options: argparse.Namespace) -> None:
    """Raise ConfigError where the file of ``--share`` cannot be written."""
    if options.share is None:
        if options.share_pictures:
            raise ConfigError("--share-pictures must come with --share FILE, got it alone")
        return
    path = Path(options.share)
    if path.suffix != ".json" or path.is_dir():
        raise ConfigError(f"what is shared must be a file that ends in .json, got {path}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"what is shared must lie in a folder that can be written to, got {path}")


def share(options: argparse.Namespace, own: Path, pictures: Mapping[str, Any]) -> None:
    """Write the file of ``--share``.

    Parameters
    ----------
    options : argparse.Namespace
    own : Path
        The comparison's own file.
    pictures : mapping of str to PIL.Image.Image
        Which go into it with ``--share-pictures``.
    """
    (report,) = read_shared(own)
    write(Path(options.share), shareable(report.document, pictures if options.share_pictures else None))
    holds = "prompt and pictures too" if options.share_pictures else "no prompt, pictures or paths"
    show(f"{options.share} can be given away: numbers, settings and versions, {holds}.")


def shared(options: argparse.Namespace) -> None:
    """One table and one picture of many files; the table alone needs no package of an extra."""
    if options.out is not None and (why := absent(versions(), "eval", ("matplotlib",))):
        raise ConfigError(f"--out needs what draws the picture, got {why}; without --out the table is printed")
    reports = read_shared(options.files)
    metrics, table = metrics_of(reports), as_markdown(reports)
    same = {name.partition(" (")[0]: name for name in metrics}
    metric = next(iter(metrics), None)
    if options.metric is not None:
        metric = chosen("the metric", options.metric, metrics, same)
    directory = None if options.out is None else outputs.prepare_directory(options.out)
    show(table)
    if directory is None:
        return
    with fits("the table", directory):
        (directory / "shared.csv").write_text(as_csv(reports), encoding="utf-8")
        (directory / "shared.md").write_text(table + "\n", encoding="utf-8")
        files = [("shared.csv", "every run, with model, device and versions"), ("shared.md", "the table")]
        if metric is not None:
            scatter(reports, metric, metrics[metric], directory / "shared.png")
            files.append(("shared.png", f"{metric} over the speed-up"))
        files += _on_frontier(reports, directory)
    saved(directory, files)


def _on_frontier(reports: Sequence[SharedReport], directory: Path) -> list[tuple[str, str]]:
    """Draw the runs among the settings of the small model, where both can be; the file, if there is one."""
    measured = {count: places for count, places in on_frontier(reports, "PSNR (dB)").items() if count in REFERENCES}
    if not measured:
        return []
    if why := missing("diffusers"):
        show(f"The frontier is not drawn: {why}")
        return []
    figure(read_points(), directory / "frontier.png", measured=measured)
    return [("frontier.png", "PSNR over the work that is saved, among the settings of the small model")]

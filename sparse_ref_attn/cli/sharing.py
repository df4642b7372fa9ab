"""What is given away, and ``sra shared``: what others gave."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..eval import outputs
from ..eval.reports.reading import read_shared
from ..eval.reports.scatter import scatter
from ..eval.reports.shareable import shareable
from ..eval.reports.table import as_csv, as_markdown, metrics_of
from ..eval.reports.writing import write
from ..extras import absent, versions
from ..files import fits
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
    saved(directory, files)

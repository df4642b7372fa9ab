"""What tests compile, compiled once for all processes of a run: the workers of pytest and the programs they start."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

__all__ = ["begin", "made", "ready"]

PLACE = "SRA_TESTS_BUILDS"
"""In the environment: the folder of this run."""


def begin() -> Callable[[], None] | None:
    """Make the folder of the run, unless it is another process's; what removes it."""
    if PLACE in os.environ:
        return None
    folder = os.environ[PLACE] = mkdtemp(prefix="sra-builds-")

    def end() -> None:
        os.environ.pop(PLACE, None)
        shutil.rmtree(folder, ignore_errors=True)

    return end


def ready(name: str) -> bool:
    """Whether the folder `name` is filled."""
    return (Path(os.environ[PLACE]) / name).exists()


def made(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`, filled by `make` where it is asked for first; all others wait for it.

    `make` fills a folder of another name, which is renamed after it has returned.
    """
    home = Path(os.environ[PLACE])
    folder, part = home / name, home / f"{name}.part"
    with (home / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder

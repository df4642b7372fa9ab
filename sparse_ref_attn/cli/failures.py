"""How a command that fails ends: one line on stderr, and the exit code of its kind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import SparseRefError
from ..extras import absent_module

__all__ = [
    "CODES", "MISTAKE", "NO_MEMORY", "STOPPED", "UNEXPECTED", "OutOfMemoryError", "code_of", "memory_told",
    "missing_package", "told",
]  # fmt: skip

MISTAKE, NO_MEMORY, UNEXPECTED, STOPPED = 2, 3, 4, 130
CODES = {
    0: "done",
    1: "whoever reads the output has gone, or a check of sra bench failed",
    MISTAKE: "what was asked cannot be done",
    NO_MEMORY: "memory ran out",
    UNEXPECTED: "an error that this library does not know (sra --traceback COMMAND shows where)",
    STOPPED: "stopped by Ctrl-C",
}


class OutOfMemoryError(SparseRefError):
    """Memory ran out; says what would need less."""


@contextmanager
def told(folder: Path, written: Sequence[str], less: Callable[[], str]) -> Iterator[None]:
    """Inside, whatever ends the command is told with what was saved in `folder` until then.

    Parameters
    ----------
    folder : Path
    written : sequence of str
        Names of the files there; read when the command ends.
    less : callable
        What would need less memory, in words.

    Raises
    ------
    OutOfMemoryError
        Where memory ran out.
    """
    try:
        with memory_told(less):
            yield
    except BaseException:
        if written:
            print(f"\nSaved before it ended in {folder}: {', '.join(written)}", file=sys.stderr)
        raise


@contextmanager
def memory_told(less: Callable[[], str]) -> Iterator[None]:
    """Inside, memory that runs out is an OutOfMemoryError that says what would need less."""
    from ..eval.loading import out_of_memory

    try:
        yield
    except BaseException as error:
        if out_of_memory(error):
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise OutOfMemoryError(f"memory must hold the run, got: {reason}{less()}") from error
        raise


def missing_package(error: BaseException | None) -> str:
    """How to get the package whose absence the error comes from, if an extra brings it; else empty."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and (words := absent_module(error.name or "")):
            return words
        error = error.__cause__
    return ""


def code_of(error: SparseRefError) -> int:
    """The exit code of an error that the library knows."""
    return NO_MEMORY if isinstance(error, OutOfMemoryError) else MISTAKE

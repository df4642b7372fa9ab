"""The command line: ``python -m sparse_ref_attn``, or ``sra``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..errors import SparseRefError
from . import failures
from .arguments import parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the program's name; default those of this process.

    Returns
    -------
    int
        One of `failures.CODES`: 0; 1 when whoever reads stdout has gone (``sra doctor | head -3``) or a check of
        ``sra bench`` failed; after a line on stderr that says what was wrong 2, 3 (out of memory), 4 (an error that
        the library does not know) or 130 (Ctrl-C).

    Examples
    --------
    >>> main(["doctor", "--json"])  # doctest: +ELLIPSIS
    {
      "versions": {
    ...
    0
    """
    trace, command = False, "sra"
    try:
        line = parser()
        try:
            options = line.parse(argv)
        finally:
            sys.stdout.flush()  # --help and --version end there
        code = 0
        if options.run is None:
            line.print_help()
        else:
            trace, command = options.traceback, options.parser.prog
            code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return 1
    except KeyboardInterrupt:
        print("\nsra: stopped", file=sys.stderr)
        return failures.STOPPED
    except Exception as error:
        if trace:
            raise
        words, code = _ending(error, command)
        print(f"sra: error: {words}", file=sys.stderr)
        return code


def _ending(error: Exception, command: str) -> tuple[str, int]:
    """One line, and the exit code of its kind."""
    if words := failures.missing_package(error):
        return f"{command} cannot run: {words}", failures.MISTAKE
    line = " ".join(str(error).split())
    if isinstance(error, SparseRefError):
        return line, failures.code_of(error)
    if isinstance(error, OSError):
        return f"what is read must be there and what is written must fit on the disk, got: {line}", failures.MISTAKE
    from ..eval.loading import out_of_memory

    if out_of_memory(error):
        less = "--offload model (where a command has it), a smaller size and fewer pictures need less"
        return f"memory must hold what is computed, got: {line or type(error).__name__}; {less}", failures.NO_MEMORY
    told = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return f"{told} (unexpected: sra --traceback shows where)", failures.UNEXPECTED

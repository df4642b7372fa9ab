"""The command line: ``python -m sparse_ref_attn``, or ``sra``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from ..errors import SparseRefError
from .arguments import parser

__all__ = ["main"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the program's name; default those of this process.

    Returns
    -------
    int
        0, 1 when whoever reads stdout has gone (``sra doctor | head -3``) or a check of ``sra bench`` failed, or 2
        after a line on stderr that says what was wrong.

    Examples
    --------
    >>> main(["doctor", "--json"])  # doctest: +ELLIPSIS
    {
      "versions": {
    ...
    0
    """
    try:
        options = parser().parse_args(argv)
        code = options.run(options)
        sys.stdout.flush()
    except SparseRefError as error:
        print(f"sra: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return 1
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        print(f"sra: error: what is written must fit on the disk, got: {error}", file=sys.stderr)
        return 2
    return code or 0

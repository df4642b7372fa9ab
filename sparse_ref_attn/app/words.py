"""What the page says of an error: words, never a traceback."""

from __future__ import annotations

import logging

from ..errors import SparseRefError
from ..eval.loading import out_of_memory
from .model import StoppedError

__all__ = ["in_words"]

logger = logging.getLogger("sparse_ref_attn")


def in_words(error: Exception) -> str:
    """One sentence on what must hold and what was got.

    An error that the library does not know is also logged, with where it came from, for whoever started the page.

    Examples
    --------
    >>> in_words(MemoryError())
    'Memory ran out: a smaller size, fewer or smaller photos, or a rule that drops tokens need less.'
    """
    line = " ".join(str(error).split())
    if isinstance(error, StoppedError):
        return "Stopped: the model is as it was."
    if out_of_memory(error):
        return "Memory ran out: a smaller size, fewer or smaller photos, or a rule that drops tokens need less."
    if isinstance(error, SparseRefError):
        return f"{line[:1].upper()}{line[1:]}."
    logger.error("an error of the page that the library does not know", exc_info=error)
    if isinstance(error, OSError):
        return f"A file could not be read or written: {line}."
    return f"Unexpected, {type(error).__name__}: {line or 'no more is known'}."

"""What is written to disk: whole or not at all, and what does not fit is told in words."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .errors import ConfigError, SparseRefError

__all__ = ["fits", "replacing"]


@contextlib.contextmanager
def fits(what: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, what cannot be written into `folder`, on a full disk for example, is a ConfigError."""
    try:
        yield
    except SparseRefError:
        raise
    except Exception as error:
        # torch.save reports a full disk as RuntimeError, safetensors as an exception of its own
        if isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError":
            raise ConfigError(f"{what} must fit into {os.fspath(folder)}, got: {error}") from error
        raise


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Gives the name of a draft to write; the file at `path` becomes it at once or, on an exception, stays.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    target = Path(path)
    with fits(target.name, target.parent):
        draft = f"{target}.{secrets.token_hex(4)}.part"
        open(draft, "x").close()
        try:
            yield draft
            os.replace(draft, target)
        except BaseException:
            os.unlink(draft)
            raise

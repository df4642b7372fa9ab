"""Which diffusers the library was tested with, and the parts of it that its public interface does not name."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import Any

from ...errors import VersionError

__all__ = ["TESTED", "dispatcher", "installed", "internal"]

TESTED = ((0, 38), (0, 42))
"""First and last (major, minor) of diffusers that the tests have run with."""


def installed() -> tuple[str, tuple[int, int]]:
    """The installed diffusers, and its (major, minor); PackageNotFoundError where there is none.

    Examples
    --------
    >>> version, (major, minor) = installed()
    >>> version.startswith(f"{major}.{minor}")
    True
    """
    return _read(importlib.metadata.version)


@cache
def _read(version_of: Callable[[str], str]) -> tuple[str, tuple[int, int]]:
    """Once a process: to find the package and read its metadata takes longer than the rest of a patch."""
    version = version_of("diffusers")
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:2])
    return version, (major, minor)


def dispatcher() -> Any:
    """The module that hands attention to backends."""
    return importlib.import_module("diffusers.models.attention_dispatch")


def internal(module: str, name: str) -> Any:
    """A class of diffusers that its public interface does not name.

    Raises
    ------
    VersionError
        If it is gone.
    """
    found = getattr(importlib.import_module(f"diffusers.{module}"), name, None)
    if found is None:
        raise VersionError(f"diffusers {importlib.metadata.version('diffusers')} must have {module}.{name}; it is gone")
    return found

"""Which diffusers the library runs with, and what it must find there."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from ...errors import VersionError

__all__ = ["DIFFUSERS_RANGE", "check_diffusers", "dispatcher", "internal"]

DIFFUSERS_RANGE = ((0, 42), (0, 43))
"""First supported and first unsupported (major, minor) of diffusers."""


def check_diffusers() -> None:
    """Raise VersionError, with words, when the installed diffusers is outside `DIFFUSERS_RANGE`."""
    (low, high) = DIFFUSERS_RANGE
    wanted = f"diffusers >= {low[0]}.{low[1]}, < {high[0]}.{high[1]}"
    try:
        version = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError as error:
        raise VersionError(f"patching this model needs {wanted}, and diffusers is not installed") from error
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:2])
    if not low <= (major, minor) < high:
        raise VersionError(
            f"patching needs {wanted}, got {version}: the seams this library relies on were checked for that range only"
        )
    registry = getattr(dispatcher(), "_AttentionBackendRegistry", None)
    missing = [n for n in ("_backends", "_constraints", "_supported_arg_names") if not hasattr(registry, n)]
    if missing:
        raise VersionError(f"diffusers {version} must keep the attention backend registry's {missing}; they are gone")


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

"""Drops the reference tokens that a reference-conditioned diffusion transformer does not use.

Public names are imported on first use, so importing the package loads nothing else: neither
diffusers nor kernels, and CUDA stays untouched. Their list is ``__init__.pyi``, which type checkers read.

Examples
--------
>>> import sparse_ref_attn as sra
>>> sra.RefSelection.__module__
'sparse_ref_attn.types'
"""

import ast
from importlib import import_module
from pkgutil import get_data

__version__ = "0.1.0"

# The home of each public name; None for a module of this package.
_HOME = {
    name.name: line.module
    for line in ast.parse(get_data(__name__, "__init__.pyi")).body
    if isinstance(line, ast.ImportFrom)
    for name in line.names
}

__all__ = sorted(["__version__", *_HOME])


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    if home is None:
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

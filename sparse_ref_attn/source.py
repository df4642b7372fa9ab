"""A configuration as the Python that makes it, to be copied."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction
from typing import Any

from . import config as public
from .config import SparseRef
from .schedules import Constant
from .selection.names import NAMES

__all__ = ["source"]

_DEFAULTS = SparseRef()


def source(value: Any) -> str:
    """A `SparseRef`, or one of its parts, as an expression with ``sra`` for the library's name.

    Fields that have their defaults are left out.

    Parameters
    ----------
    value : SparseRef, selector, reducer, budget, execution, refresh, number, str, tuple or None

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> source(SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Every(1 / 3))))
    'sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=sra.Every(1 / 3)))'
    >>> source(SparseRef("mass", sra.Polynomial(0.1, 0.5, gamma=2.0)))
    'sra.SparseRef("mass", sra.Polynomial(low=0.1, high=0.5))'
    """
    if isinstance(value, SparseRef):
        return _configuration(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(source, value))}{',' * (len(value) == 1)})"
    if is_dataclass(value) and not isinstance(value, type):
        return _made(value)
    return repr(value)


def _configuration(config: SparseRef) -> str:
    name = next((name for name, kind in NAMES.items() if config.select == kind()), None)
    budget = config.budget
    plain = budget.keep if isinstance(budget, Constant) and budget == Constant(budget.keep) else budget
    parts = [source(config.select if name is None else name), source(plain)]
    for field in fields(SparseRef):
        held = getattr(config, field.name)
        if field.name not in ("select", "budget") and held != getattr(_DEFAULTS, field.name):
            parts.append(f"{field.name}={source(held)}")
    return f"sra.SparseRef({', '.join(parts)})"


def _made(value: Any) -> str:
    """A dataclass with the fields that differ from its defaults; one that needs a single field has it unnamed."""
    needed = [field.name for field in fields(value) if field.default is MISSING and field.init]
    parts = []
    for field in fields(value):
        held = getattr(value, field.name)
        if field.default is MISSING or held != field.default:
            named = "" if needed == [field.name] else f"{field.name}="
            parts.append(f"{named}{source(held)}")
    name = type(value).__name__
    return f"sra.{'config.' * (name in public.__all__)}{name}({', '.join(parts)})"


def _number(value: float) -> str:
    """Thirds and sevenths as such."""
    near = Fraction(value).limit_denominator(100)
    short = repr(value)
    return short if len(short) < 8 or float(near) != value else f"{near.numerator} / {near.denominator}"

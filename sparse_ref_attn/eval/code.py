"""A configuration as the Python that makes it, and in a few words."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction
from typing import Any

from ..config import SparseRef
from ..execution import Cache, Tokens
from ..refresh import Never
from ..schedules import Constant
from ..selection import AttentionMass, Reducer
from ..selection.names import NAMES

__all__ = ["code_of", "words_of"]

_PLAIN: dict[str, Any] = {
    "floor": 0, "weights": None, "multiple": 1, "guard": None, "clock": "steps", "seed": 0,
}  # fmt: skip
"""Fields of `SparseRef` beside selector, budget and execution, with their defaults."""


def code_of(config: SparseRef) -> str:
    """An expression that makes an equal configuration where ``sra`` is the library.

    Parameters
    ----------
    config : SparseRef
        Of settings alone: what holds a function, pixels or a ranking is named, not written out.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> code_of(sra.SparseRef("mass", 1 / 8, execute=sra.Cache(per="tile", refresh=sra.Every(1 / 3))))
    "sra.SparseRef('mass', 1 / 8, execute=sra.Cache(refresh=sra.Every(1 / 3), per='tile'))"
    >>> eval(code_of(sra.ReCAST(task="subject"))) == sra.ReCAST(task="subject")
    True
    """
    usual = (name for name, kind in NAMES.items() if type(config.select) is kind and config.select == kind())
    select = next(map(repr, usual), None)
    keep = _keep(config)
    plain = keep is not None and config.budget == Constant(keep)
    given = [select or _code(config.select), _code(keep if plain else config.budget)]
    if config.execute != Tokens():
        given.append(f"execute={_code(config.execute)}")
    given += [f"{name}={_code(own)}" for name, usual in _PLAIN.items() if (own := getattr(config, name)) != usual]
    return f"sra.SparseRef({', '.join(given)})"


def words_of(config: SparseRef) -> str:
    """What it does, in a few words.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> words_of(sra.SparseRef("edges", 0.25)), words_of(sra.SparseRef("grid", 1.0, "cache", refresh=sra.Never()))
    ('edges 25 %', 'stored once')
    >>> words_of(sra.SparseRef("mass", 1 / 8, execute=sra.Cache(per="tile")))
    'stored, tiles read 12.5 %'
    """
    keep, way = _keep(config), config.execute
    kind = type(config.select)
    rule = next((name for name, known in NAMES.items() if known is kind), kind.__name__.lower())
    if isinstance(config.select, AttentionMass) and config.select.value_norm:
        rule = "mass x values"
    share = f"{100 * keep:.3g} %" if isinstance(keep, float) else f"{keep} tokens" if keep else str(config.budget)
    if isinstance(config.select, Reducer) or not isinstance(way, Cache):
        depth = f" from block {config.from_block}" if config.from_block else ""
        return f"{rule} {share}{depth}" + (" in flight" if config.profile == "in_flight" else "")
    stored = "stored once" if isinstance(way.refresh, Never) else "stored"
    if way.refresh is not None and not isinstance(way.refresh, Never):
        stored += f" at {_code(way.refresh).removeprefix('sra.')}"
    who = "tiles" if way.per == "tile" else rule
    return stored if keep == 1.0 else f"{stored}, {who} read {share}"


def _keep(config: SparseRef) -> Any:
    """The share or number of a budget that is the same at every step, else nothing."""
    return getattr(config.budget, "keep", None) if isinstance(config.budget, Constant) else None


def _code(value: Any) -> str:
    if isinstance(value, float):
        part = Fraction(value).limit_denominator(64)
        exact = part.numerator and part.denominator > 1 and part.numerator / part.denominator == value
        return f"{part.numerator} / {part.denominator}" if exact and len(repr(value)) > 4 else repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_code, value))}{',' * (len(value) == 1)})"
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    kept = (f for f in fields(value) if f.init and getattr(value, f.name) != _default(f))
    home = "sra.config." if type(value).__name__ == "UniformGuard" else "sra."
    ordered, inner = [], [f for f in fields(value) if f.init]
    for f in kept:
        text = _code(getattr(value, f.name))
        ordered.append(text if f is inner[0] and f.default is MISSING else f"{f.name}={text}")
    return f"{home}{type(value).__name__}({', '.join(ordered)})"


def _default(f: Any) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default

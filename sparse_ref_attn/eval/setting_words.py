"""A configuration in a few words."""

from __future__ import annotations

from typing import Any

from ..config import SparseRef
from ..execution import Cache
from ..refresh import Never
from ..schedules import Constant
from ..selection import AttentionMass, Reducer
from ..selection.names import NAMES
from ..source import source

__all__ = ["words_of"]


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
        stored += f" at {source(way.refresh).removeprefix('sra.')}"
    who = "tiles" if way.per == "tile" else rule
    return stored if keep == 1.0 else f"{stored}, {who} read {share}"


def _keep(config: SparseRef) -> Any:
    """The share or number of a budget that is the same at every step, else nothing."""
    return getattr(config.budget, "keep", None) if isinstance(config.budget, Constant) else None

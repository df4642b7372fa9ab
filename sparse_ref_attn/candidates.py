"""The configurations among which presets and plans are chosen: one list, measured as a whole on the frontier."""

from __future__ import annotations

from collections.abc import Mapping

from .config import SparseRef
from .execution import Cache, Tokens
from .refresh import Every, Never, Refresh
from .rivals import Downscale
from .schedules import Polynomial

__all__ = ["CANDIDATES", "DENSE", "held_back"]

DENSE = "dense"
"""The key of runs with every token in every step, in all or in fewer steps; no candidate."""


def _stored(refresh: Refresh | None) -> SparseRef:
    """References stored, and all of them read."""
    return SparseRef("grid", 1.0, execute=Cache(refresh=refresh))


def _tiles(share: float, refresh: Refresh | None, rest: str | None = "means") -> SparseRef:
    return SparseRef("mass", share, execute=Cache(refresh=refresh, per="tile", rest=rest))


CANDIDATES: Mapping[str, SparseRef] = {
    "stored-sixths": _stored(Every(1 / 6)),
    "stored-quarters": _stored(None),
    "stored-thirds": _stored(Every(1 / 3)),
    "stored-thirds-warm": _stored(Every(1 / 3, warmup=2)),
    "stored-halves": _stored(Every(0.5)),
    "stored-once": _stored(Never()),
    "tiles-8th-quarters": _tiles(1 / 8, None),
    "tiles-8th-thirds": _tiles(1 / 8, Every(1 / 3)),
    "tiles-8th-thirds-warm": _tiles(1 / 8, Every(1 / 3, warmup=2)),
    "tiles-8th-halves": _tiles(1 / 8, Every(0.5)),
    "tiles-8th-once": _tiles(1 / 8, Never()),
    "tiles-16th-thirds": _tiles(1 / 16, Every(1 / 3)),
    "tiles-16th-halves": _tiles(1 / 16, Every(0.5)),
    "tiles-16th-once": _tiles(1 / 16, Never()),
    "tiles-8th-no-means": _tiles(1 / 8, Every(1 / 3, warmup=2), None),
    "ranked-4th-thirds": SparseRef("mass", 0.25, execute=Cache(refresh=Every(1 / 3))),
    "both-half-once": SparseRef("mass", 0.5, execute=Cache("kept", refresh=Never())),
    "recast": SparseRef("mass", Polynomial(0.0625, 0.25, gamma=2.0)),
    "mass-50": SparseRef("mass", 0.5),
    "mass-25": SparseRef("mass", 0.25),
    "mass-10": SparseRef("mass", 0.1),
    "mass-25-in-flight": SparseRef("mass", 0.25, execute=Tokens(in_flight=True)),
    "saliency-50": SparseRef("saliency", 0.5),
    "saliency-25": SparseRef("saliency", 0.25),
    "edges-25": SparseRef("edges", 0.25),
    "downscaled-25": SparseRef(Downscale(), 0.25),
}
"""By key, as the rows of ``assets/frontier.csv`` have it. Refreshes are shares of a run, so that they fit any number of
steps: "quarters" is `refresh.standard`, halves in a run of up to eight steps; "once" computes the references in the
first step alone. "8th" and "16th" are the shares that each tile reads."""


def held_back(config: SparseRef) -> str:
    """Why a candidate is measured, but not chosen for anybody; "" where it may be.

    Examples
    --------
    >>> held_back(CANDIDATES["stored-halves"])
    ''
    """
    if config.per == "tile":
        return "reading per tile saves work; in the rows measured so far it takes longer than reading everything"
    return ""

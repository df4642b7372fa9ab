"""The configurations that are compared with each other, each at the same number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from .. import schedules
from ..config import SparseRef
from ..errors import ConfigError
from ..rivals import Downscale, ToMe
from ..selection import AttentionMass
from ..selection.names import NAMES

__all__ = ["METHODS", "methods"]

METHODS: tuple[str, ...] = (
    "downscaled",
    "ReCAST rising",
    "ReCAST flat",
    "edges",
    "saliency",
    "mass x values",
    "self-attention",
    "cosine",
    "grid",
    "random",
    "ToMe",
)
"""What `methods` can make, the user's real alternative first."""


def methods(keep: float, names: Sequence[str] = METHODS, *, seed: int = 0) -> dict[str, SparseRef]:
    """Configurations by name that keep the same share of the tokens in the steps that drop any.

    Those that measure the attention run their first step dense, so their mean over a run is higher: compare it too.

    Parameters
    ----------
    keep : float, in (0, 1]
        Share of each reference's tokens. "ReCAST rising" goes from two fifths of it to eight fifths over the
        run, less where eight fifths would be more than all; everything else keeps it at every step.
    names : sequence of str
        Of `METHODS`.
    seed : int

    Raises
    ------
    ConfigError
        For an unknown name, or `keep` outside (0, 1].

    Examples
    --------
    >>> list(methods(0.25, ["downscaled", "edges"]))
    ['downscaled', 'edges']
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep must lie in (0, 1], got {keep}")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ConfigError(f"methods must be among {', '.join(METHODS)}, got {', '.join(unknown)}")
    swing = min(0.6, 1 / keep - 1)
    rising = schedules.Linear((1 - swing) * keep, (1 + swing) * keep)
    found = {
        "downscaled": SparseRef(select=Downscale(), budget=keep, seed=seed),
        "ReCAST rising": SparseRef(select=AttentionMass(), budget=rising, seed=seed),
        "ReCAST flat": SparseRef(select=AttentionMass(), budget=keep, seed=seed),
        "mass x values": SparseRef(select=AttentionMass(value_norm=True), budget=keep, seed=seed),
        "ToMe": SparseRef(select=ToMe(), budget=keep, seed=seed),
    }
    for name in set(METHODS) & set(NAMES):
        found[name] = SparseRef(select=name, budget=keep, seed=seed)
    return {name: found[name] for name in names}

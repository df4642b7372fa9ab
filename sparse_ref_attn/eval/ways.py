"""Presets and rules by one list of names, each as a family of configurations over the share that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..config import SparseRef
from ..estimation import Amount
from ..vocabulary import METHODS, PRESETS, SAME, chosen
from .methods import methods

__all__ = ["WAYS", "family_of"]

WAYS: tuple[str, ...] = (*PRESETS, *METHODS)
"""Presets first, then every rule by the name that it has everywhere."""


def family_of(
    way: str, *, steps: int | None = None, seed: int = 0, settings: Mapping[str, Any] | None = None
) -> Callable[[float], SparseRef]:
    """The configurations of one of `WAYS`, by the share in (0, 1] that they keep; what `estimation.at_share` takes.

    Parameters
    ----------
    way : str
    steps : int, optional
        Of the run, as for `methods`.
    seed : int
        Of what a rule draws.
    settings : mapping, optional
        Further fields of `SparseRef`.

    Raises
    ------
    ConfigError
        If it is none of `WAYS`.

    Examples
    --------
    Presets that keep every token do so at any share.

    >>> family_of("balanced")(0.25).budget
    Constant(keep=1.0, per='reference')
    >>> family_of("edges")(0.25).budget, family_of("Recast")(0.25).budget
    (Constant(keep=0.25, per='reference'), Polynomial(low=0.125, high=0.5, gamma=2.0, per='reference'))
    """
    way, given = chosen("the rule", way, WAYS, SAME), dict(settings or {})
    if way in PRESETS:
        return Amount(way, None, {"seed": seed, **given}).family

    def family(share: float) -> SparseRef:
        return replace(methods(share, [way], seed=seed, steps=steps)[way], **given)

    return family

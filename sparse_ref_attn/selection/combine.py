"""Selectors made of selectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import is_number
from ..errors import ConfigError
from .base import Probe, References, Selector, scores_of

__all__ = ["Mix", "Union"]


@dataclass(frozen=True)
class Mix(Selector):
    r"""Weighted mean of several selectors' ranks.

    .. math:: s(k) = \sum_m w_m \rho_m(k) / \sum_m w_m

    rho is the token's rank under selector m among the tokens of all references, 0 for the lowest score and 1
    for the highest; equal scores share the mean of their ranks. Ranks, and not scores scaled to [0, 1], because
    attention mass is so skewed that one token would push all others to 0, where any partner outvotes them. Over all
    references, because scores compare across references when these compete for a shared budget:
    a mix of one selector orders tokens as that selector does, and one that scores all alike adds nothing.

    Parameters
    ----------
    parts : mapping of Selector to float, or sequence of (Selector, float)
        Selectors and their weights, finite and > 0. Kept as a tuple of pairs.

    Raises
    ------
    ConfigError
        If there is no part, a part is not a selector or a weight is out of range.

    Notes
    -----
    A score that is NaN makes the mix NaN at that token.

    Examples
    --------
    >>> from sparse_ref_attn.selection import Edges, Grid
    >>> Mix({Edges(): 3, Grid(): 1}).parts[1]
    (Grid(), 1.0)
    """

    parts: Mapping[Selector, float] | Sequence[tuple[Selector, float]]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, (Mapping, Sequence)):
            raise ConfigError(f"a mix must be made of (selector, weight) pairs, got {self.parts!r}")
        pairs = self._pairs()
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise ConfigError(f"a mix must be made of (selector, weight) pairs, got {self.parts!r}")
        _check_selectors("a mix", [selector for selector, _ in pairs])
        for _, weight in pairs:
            if not is_number(weight) or not 0 < weight < math.inf:
                raise ConfigError(f"weights of a mix must be finite numbers above 0, got {weight!r}")
        object.__setattr__(self, "parts", tuple((selector, float(weight)) for selector, weight in pairs))

    def _pairs(self) -> tuple[tuple[Selector, float], ...]:
        return tuple(self.parts.items()) if isinstance(self.parts, Mapping) else tuple(self.parts)

    def probes(self) -> tuple[Probe, ...]:
        return _probes([selector for selector, _ in self._pairs()])

    def check(self, model: str) -> None:
        for selector, _ in self._pairs():
            selector.check(model)

    def score(self, references: References) -> list[Tensor]:
        mixed = torch.zeros(references.layout.reference_tokens, dtype=torch.float64, device=references.tokens.device)
        for selector, weight in self._pairs():
            mixed += weight * mean_ranks(torch.cat(scores_of(selector, references)))
        highest = max(len(mixed) - 1, 1) * sum(weight for _, weight in self._pairs())
        return references.split((mixed / highest).float())


@dataclass(frozen=True)
class Union(Selector):
    """The best of each selector in turn: the first of the first, the first of the second, ..., then the seconds.

    Of any k tokens kept of a reference at least k // n are the top k // n of each of the n selectors.
    score = 1 - (n * rank + m) / (n * R_i), least over the selectors m = 0, ..., n - 1, with the token's rank
    0, ..., R_i - 1 under m within its own reference, equal scores by position. References that compete for
    a shared budget therefore get shares in proportion to their sizes.

    Parameters
    ----------
    selectors : sequence of Selector
        At least one; an earlier one wins a tie. Kept as a tuple.

    Raises
    ------
    ConfigError
        If there is no selector, or something else than one.

    Notes
    -----
    A score that is NaN makes the union NaN at that token.

    Examples
    --------
    >>> from sparse_ref_attn.selection import AttentionMass, Edges
    >>> len(Union([Edges(), AttentionMass()]).probes())
    1
    """

    selectors: Sequence[Selector]

    def __post_init__(self) -> None:
        if not isinstance(self.selectors, Sequence):
            raise ConfigError(f"a union must be made of a sequence of selectors, got {self.selectors!r}")
        selectors = tuple(self.selectors)
        _check_selectors("a union", selectors)
        object.__setattr__(self, "selectors", selectors)

    def probes(self) -> tuple[Probe, ...]:
        return _probes(self.selectors)

    def check(self, model: str) -> None:
        for selector in self.selectors:
            selector.check(model)

    def score(self, references: References) -> list[Tensor]:
        count = len(self.selectors)
        columns = [scores_of(selector, references) for selector in self.selectors]
        scores = []
        for parts in zip(*columns, strict=True):
            size = len(parts[0])
            turns = torch.stack([count * _positions(part) + m for m, part in enumerate(parts)]).amin(0)
            turns = turns.masked_fill(torch.stack(list(parts)).isnan().any(0), torch.nan)
            scores.append((1 - turns / (count * size)).float())
        return scores


def mean_ranks(scores: Tensor) -> Tensor:
    """Ascending ranks from 0, equal scores sharing their mean rank, NaN staying NaN: (R,) to (R,) float64.

    Examples
    --------
    >>> mean_ranks(torch.tensor([0.3, 0.1, 0.3])).tolist()
    [1.5, 0.0, 1.5]
    """
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, scores, right=False)
    upto = torch.searchsorted(ordered, scores, right=True)
    return torch.where(scores.isnan(), torch.nan, (below + upto - 1).double() / 2)


def _positions(scores: Tensor) -> Tensor:
    """Each token's place in descending order, ties by position: (R,) to (R,) float64."""
    order = scores.sort(descending=True, stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places.double()


def _probes(selectors: Sequence[Selector]) -> tuple[Probe, ...]:
    return tuple(dict.fromkeys(probe for selector in selectors for probe in selector.probes()))


def _check_selectors(what: str, selectors: Sequence[object]) -> None:
    if not selectors:
        raise ConfigError(f"{what} must have at least one selector, got none")
    for selector in selectors:
        if not isinstance(selector, Selector):
            raise ConfigError(f"{what} must be made of selectors, got {selector!r}")

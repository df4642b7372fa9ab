"""How many reference tokens a training step keeps, and which: drawn at random, uniformly over the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..checks import is_int, is_number
from ..errors import ConfigError
from ..schedules import check_floor, floors
from ..schedules.rounding import whole
from ..selection.ranking import order, prefix
from ..types import RefSelection
from ..vocabulary import chosen

__all__ = ["DISTRIBUTIONS", "RandomDrop"]

DISTRIBUTIONS: Mapping[str, Callable[[float, float, float], float]] = {
    "uniform": lambda low, high, u: low + (high - low) * u,
    "log_uniform": lambda low, high, u: low * (high / low) ** u,
    "arcsine": lambda low, high, u: low + (high - low) * math.sin(math.pi / 2 * u) ** 2,
}
"""Quantile functions of the keep ratio: its value in [low, high] below which a share `u` of the draws lies."""


@dataclass(frozen=True)
class RandomDrop:
    """Random dropping of reference tokens at a random ratio, for fine-tuning.

    A draw takes a keep ratio r from `distribution` over `keep`, then ``round(r * R)`` of all R
    reference tokens, every set of that size equally likely. So a model learns to work with any
    budget and any rule of selection.

    Parameters
    ----------
    keep : float or (float, float), in (0, 1]
        Lowest and highest share of the reference tokens that is kept; a single number keeps that
        share always.
    distribution : {"uniform", "log_uniform", "arcsine"}
        Of the keep ratio between the two ends: "uniform" has mean (low + high) / 2; "log_uniform"
        is uniform in log r, so that small budgets are trained as often as large ones in ratio;
        "arcsine" (Beta(1/2, 1/2)) favours both ends.
    per_sample : bool
        False, the cheap choice: one draw for the batch, which stays rectangular. True: each item its
        own count and tokens; see `patch_for_training` for what it costs.
    full_probability : float, in [0, 1]
        Share of the draws that keep every token, besides the distribution's. On the small model 0.5
        loses less than 0.1 where every token is kept.
    floor_per_reference : float or int
        Least kept of each reference: a ratio of it, or tokens. Default 0: references compete, and a
        small one may lose all its tokens. A draw keeps at least one token in any case.
    seed : int, >= 0
        Of the library's own generator; the global random streams are untouched.

    Raises
    ------
    ConfigError
        For a value outside its range.

    Notes
    -----
    Sparse Context [1]_ fine-tunes with random dropping at varying ratios, and does not publish the
    distribution. Range, distributions, full share and floors are therefore this library's choice,
    and the defaults are no one's published setting.

    References
    ----------
    .. [1] "Keep The Essentials" (Sparse Context), arXiv 2606.23682.

    Examples
    --------
    >>> drop = RandomDrop(keep=(0.25, 0.75))
    >>> drop.draw((8,), torch.Generator().manual_seed(0))
    RefSelection(indices=tensor([0, 1, 2, 3, 6]), sizes=(8,))
    >>> RandomDrop.from_dict(drop.to_dict()) == drop
    True
    """

    keep: float | tuple[float, float] = (0.1, 1.0)
    distribution: str = "uniform"
    per_sample: bool = False
    full_probability: float = 0.0
    floor_per_reference: float | int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _ends(self.keep))
        object.__setattr__(self, "distribution", chosen("distribution", self.distribution, DISTRIBUTIONS))
        if not isinstance(self.per_sample, bool):
            raise ConfigError(f"per_sample must be a bool, got {self.per_sample!r}")
        if not is_number(self.full_probability) or not 0 <= self.full_probability <= 1:
            raise ConfigError(f"full_probability must lie in [0, 1], got {self.full_probability!r}")
        check_floor("floor_per_reference", self.floor_per_reference)
        if not is_int(self.seed, 0):
            raise ConfigError(f"seed must be an int of at least 0, got {self.seed!r}")

    def draw(self, sizes: Sequence[int], generator: torch.Generator | None = None) -> RefSelection:
        """The tokens kept by one draw.

        Parameters
        ----------
        sizes : sequence of int
            Tokens of each reference, R in all.
        generator : torch.Generator, optional
            On any device. Default the CPU's global one.

        Returns
        -------
        RefSelection
            K of R indices, ascending, int64, on the CPU.

        Raises
        ------
        BudgetError
            If a reference has fewer tokens than its floor.
        """
        device = "cpu" if generator is None else generator.device
        total, least = sum(sizes), floors(self.floor_per_reference, sizes)
        numbers = torch.rand(2 + total, generator=generator, dtype=torch.float64, device=device).cpu()
        full, u = numbers[:2].tolist()
        assert isinstance(self.keep, tuple)
        ratio = 1.0 if full < self.full_probability else DISTRIBUTIONS[self.distribution](*self.keep, u)
        count = self._count(ratio, sizes)
        scores = numbers[2:].split(list(sizes))
        return RefSelection(prefix(order(scores, least), count), tuple(sizes))

    def counts(self, sizes: Sequence[int]) -> list[int]:
        """Every number of tokens, ascending, that a draw from references of `sizes` tokens may keep.

        Raises
        ------
        BudgetError
            As `draw`.

        Examples
        --------
        >>> RandomDrop(keep=(0.25, 0.5), full_probability=0.1).counts((8,))
        [2, 3, 4, 8]
        """
        assert isinstance(self.keep, tuple)
        least, most = (self._count(ratio, sizes) for ratio in self.keep)
        counts = {*range(least, most + 1)} if self.full_probability < 1 else set()
        return sorted(counts | ({sum(sizes)} if self.full_probability > 0 else set()))

    def _count(self, ratio: float, sizes: Sequence[int]) -> int:
        return min(max(whole(ratio * sum(sizes)), sum(floors(self.floor_per_reference, sizes))), sum(sizes))

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        data = asdict(self)
        return {**data, "keep": list(data["keep"])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RandomDrop:
        """What `to_dict` wrote.

        Raises
        ------
        ConfigError
            For an unknown name or a value outside its range.
        """
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(f"a RandomDrop must have known settings only, got {', '.join(unknown)}")
        return cls(**data)


def _ends(keep: Any) -> tuple[float, float]:
    """Lowest and highest keep ratio."""
    ends = (keep, keep) if is_number(keep) else tuple(keep) if isinstance(keep, (list, tuple)) else ()
    if len(ends) != 2 or not all(map(is_number, ends)):
        raise ConfigError(f"keep must be a ratio or (low, high), got {keep!r}")
    low, high = map(float, ends)
    if not 0 < low <= high <= 1:
        raise ConfigError(
            f"keep must hold ratios with 0 < low <= high <= 1, got {keep!r} (text-to-image steps need no ratio: "
            "a call without references passes through untouched)"
        )
    return low, high

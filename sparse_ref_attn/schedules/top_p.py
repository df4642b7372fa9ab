"""A budget read off the attention mass: as many tokens as hold a share of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import is_number
from ..errors import BudgetError, ConfigError, NonFiniteError
from .base import Budget, Keep, check_keep, check_order, tokens_of
from .clock import Clock
from .rounding import whole

__all__ = ["TopP"]


@dataclass(frozen=True)
class TopP(Budget):
    """The fewest tokens that together hold a share of the profiled attention mass; constant over the run.

    Where the mass is concentrated few tokens are kept, where it is near uniform (an edit that needs the whole
    reference) nearly a share `p` of them.

    Parameters
    ----------
    p : float
        Share in (0, 1]: of each reference's own mass for ``per="reference"``, of all references' for ``per="all"``.
    min_tokens : int or float, optional
        Floor: tokens or ratio. A floor above a reference's tokens is a `BudgetError`.
    max_tokens : int or float, optional
        Cap: tokens or ratio. A cap above a reference's tokens does nothing.

    Notes
    -----
    Syncs once a call (the mass is copied to the host); `varies` is "never", so one call serves a whole run.

    Examples
    --------
    >>> mass = [torch.tensor([0.1, 0.5, 0.1, 0.3])]
    >>> TopP(0.7).counts(Clock.uniform(0, 4), [4], mass)
    (2,)
    """

    p: float
    min_tokens: Keep | None = None
    max_tokens: Keep | None = None
    per: str = "reference"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.p) or not 0 < self.p <= 1:
            raise ConfigError(f"p must be a share in (0, 1], got {self.p!r}")
        for name, keep in (("min_tokens", self.min_tokens), ("max_tokens", self.max_tokens)):
            if keep is not None:
                check_keep(name, keep)
        if self.min_tokens is not None and self.max_tokens is not None:
            check_order("min_tokens", self.min_tokens, "max_tokens", self.max_tokens)

    def amounts(self) -> dict[str, Keep]:
        return {} if self.min_tokens is None else {"min_tokens": self.min_tokens}

    @property
    def varies(self) -> str:
        return "never"

    @property
    def needs_mass(self) -> bool:
        return True

    def counts(self, clock: Clock, sizes: Sequence[int], mass: Sequence[Tensor] | None = None) -> tuple[int, ...]:
        """Tokens that hold the share `p`; see `Budget.counts`.

        Raises
        ------
        BudgetError
            If there is no mass, its shapes are not the references', or the floor exceeds the tokens or the cap.
        NonFiniteError
            If the mass holds NaN, infinity or a negative value.
        """
        groups = self._groups(sizes)
        if mass is None:
            raise BudgetError("TopP must be given the attention mass of a profiling step, got none")
        shapes = [tuple(m.shape) for m in mass]
        if shapes != [(size,) for size in sizes]:
            raise BudgetError(
                f"TopP must be given one mass value a token of references of {tuple(sizes)} tokens, got shapes {shapes}"
            )
        joined = torch.cat(list(mass)).cpu().double()  # the one sync
        if not bool((joined.isfinite() & (joined >= 0)).all()):
            raise NonFiniteError("the attention mass must be finite and >= 0, got NaN, infinity or a negative value")
        parts = joined.split([size for _, size in groups])
        return tuple(self._count(name, size, part) for (name, size), part in zip(groups, parts, strict=True))

    def _count(self, name: str, size: int, mass: Tensor) -> int:
        self._check_size(name, size)
        held = mass.sort(descending=True).values.cumsum(0)
        count = int((held < self.p * held[-1]).sum()) + 1
        low = 1 if self.min_tokens is None else whole(tokens_of(self.min_tokens, size))
        high = size if self.max_tokens is None else min(size, whole(tokens_of(self.max_tokens, size)))
        if low > high:
            raise BudgetError(
                f"min_tokens must not exceed max_tokens, got {low} and {high} tokens for {name} of {size} tokens"
            )
        return min(max(count, low), high)

"""What every budget is: how many reference tokens take part at a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from ..checks import is_int, is_number, is_one_of
from ..errors import BudgetError, ConfigError
from .clock import Clock
from .rounding import whole

__all__ = ["Budget", "Keep", "Piecewise"]

Keep = int | float
"""An amount of tokens: an int is a number of tokens (>= 1), a float a ratio in (0, 1]."""


def check_keep(name: str, keep: Keep) -> None:
    """Refuse what is neither a number of tokens nor a ratio."""
    if not (is_int(keep, 1) or (isinstance(keep, float) and 0.0 < keep <= 1.0)):
        raise ConfigError(f"{name} must be a number of tokens (int >= 1) or a ratio (float in (0, 1]), got {keep!r}")


def check_order(low_name: str, low: Keep, high_name: str, high: Keep) -> None:
    """Refuse ``low > high`` where both are tokens or both are ratios; mixed pairs need a size to compare."""
    if type(low) is type(high) and low > high:
        raise ConfigError(f"{low_name} must not exceed {high_name}, got {low_name} {low} and {high_name} {high}")


def check_exponent(gamma: float) -> None:
    """Refuse an exponent that is not a positive finite number."""
    if not is_number(gamma) or not 0 < gamma < math.inf:
        raise ConfigError(f"gamma must be a finite number > 0, got {gamma!r}")


def tokens_of(keep: Keep, size: int) -> float:
    """Tokens that `keep` means for a reference of `size` tokens, before rounding."""
    return float(keep) if isinstance(keep, int) else keep * size


class Budget:
    """How many reference tokens take part at each step.

    Amounts are numbers of tokens (int) or ratios (float in (0, 1]). A ratio scales with each reference's size, so four
    references of one megapixel get four times what one gets, and a small reference is not starved or overrun.

    Parameters
    ----------
    per : {"reference", "all"}
        "reference": a count for each reference. "all": one total, for which the tokens of all references compete.

    Notes
    -----
    The clock: ``progress = 1 - t / T``, 0 at the first, high-noise step and 1 at the last (see `Clock`).
    Counts are host integers; no budget but `TopP` looks at a tensor, so none but it syncs.

    A budget of your own is a frozen dataclass with a field ``per: str = "reference"`` and the methods `amounts` and
    `tokens_at`; it travels to JSON under its class name as the built-in ones do.
    """

    per: str
    _kinds: ClassVar[dict[str, type[Budget]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            Budget._kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        if not is_one_of(self.per, ("reference", "all")):
            raise ConfigError(f'per must be "reference" or "all", got {self.per!r}')

    def amounts(self) -> dict[str, Keep]:
        """Every amount that the run may reach, by field name; all of them must be available."""
        raise NotImplementedError

    def tokens_at(self, clock: Clock, size: int) -> float:
        """Tokens of a reference (or of all) of `size` tokens at this step, before rounding."""
        raise NotImplementedError

    @property
    def varies(self) -> str:
        """How the count changes over a run: "never", "pieces" (a few constant stretches) or "every step"."""
        return "every step" if len(set(self.amounts().values())) > 1 else "never"

    @property
    def needs_mass(self) -> bool:
        """Whether `counts` needs the attention mass of a profiling step."""
        return False

    def counts(self, clock: Clock, sizes: Sequence[int], mass: Sequence[Tensor] | None = None) -> tuple[int, ...]:
        """Tokens to keep at a step, rounded half up, at least 1.

        Parameters
        ----------
        clock : Clock
            The step.
        sizes : sequence of int
            Tokens of each reference R_i, at least one reference.
        mass : sequence of Tensor, shape (R_i,), optional
            Profiled attention mass (ReCAST eq. 3) of each reference's tokens; only `TopP` reads it.

        Returns
        -------
        tuple of int
            ``len(sizes)`` counts for ``per="reference"``, one total for ``per="all"``.

        Raises
        ------
        BudgetError
            If the budget asks, at this step or a later one, for more tokens than there are, or its lower end lies
            above its upper one for a reference of this size. It is raised at the first step, not in mid-run.
        """
        groups = self._groups(sizes)
        for name, size in groups:
            self._check_size(name, size)
        return tuple(whole(self.tokens_at(clock, size)) for _, size in groups)

    def _groups(self, sizes: Sequence[int]) -> list[tuple[str, int]]:
        if not sizes or min(sizes) < 1:
            raise BudgetError(f"a budget needs at least one reference of at least one token, got sizes {tuple(sizes)}")
        if self.per == "all":
            return [("all references together", sum(sizes))]
        return [(f"reference {i}", size) for i, size in enumerate(sizes)]

    def _check_size(self, name: str, size: int) -> None:
        for amount, keep in self.amounts().items():
            if isinstance(keep, int) and keep > size:
                raise BudgetError(
                    f"{type(self).__name__} must not ask for more tokens than there are: "
                    f"{amount} = {keep}, and {name} has {size} tokens (a float in (0, 1] scales with the size)"
                )

    def piecewise(self, pieces: int) -> Budget:
        """Hold this budget constant within `pieces` equal parts of the run's progress.

        Each part takes the value at its middle. For step caches and compiled graphs, which want few lengths.

        Examples
        --------
        >>> from sparse_ref_attn.schedules import Linear
        >>> b = Linear(0.1, 0.9).piecewise(4)
        >>> [b.counts(Clock.uniform(i, 8), [1000])[0] for i in range(8)]
        [200, 200, 400, 400, 600, 600, 800, 800]
        """
        if self.varies == "never":
            return self
        return Piecewise(self, pieces, per=self.per)

    def mean_tokens(
        self, sizes: Sequence[int], steps: int, dense_steps: int = 1, mass: Sequence[Tensor] | None = None
    ) -> float:
        """Average number of reference tokens a step, all references together, on the uniform clock.

        Parameters
        ----------
        sizes : sequence of int
            Tokens of each reference.
        steps : int
            Steps of the run, >= 1.
        dense_steps : int
            Profiling steps in [0, steps]; they are the first ones, keep every token, and *replace* the budget there.
            1 for selectors that rank by attention, 0 for those that do not.
        mass : sequence of Tensor, shape (R_i,), optional
            For budgets with `needs_mass`.

        Raises
        ------
        BudgetError
            As `counts`, or if `dense_steps` is outside its range.

        Examples
        --------
        ReCAST's eq. (4) averages 517 tokens, not the ~600 of the paper; with its profiling step 654:

        >>> from sparse_ref_attn.schedules import Polynomial
        >>> b = Polynomial(256, 1024)
        >>> round(b.mean_tokens([4096], 28, dense_steps=0)), round(b.mean_tokens([4096], 28))
        (517, 654)
        """
        if steps < 1 or not 0 <= dense_steps <= steps:
            raise BudgetError(
                f"mean_tokens needs steps >= 1 and 0 <= dense_steps <= steps, got {dense_steps} of {steps}"
            )
        kept = dense_steps * sum(sizes)
        if self.varies == "never":
            one = sum(self.counts(Clock.uniform(0, steps), sizes, mass))
            return (kept + (steps - dense_steps) * one) / steps
        kept += sum(sum(self.counts(Clock.uniform(i, steps), sizes, mass)) for i in range(dense_steps, steps))
        return kept / steps

    def to_dict(self) -> dict[str, Any]:
        """This budget as JSON types: its class name under "kind", then its fields."""
        out: dict[str, Any] = {"kind": type(self).__name__}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Budget):
                value = value.to_dict()
            out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Budget:
        """The budget that `to_dict` wrote.

        Raises
        ------
        ConfigError
            If the kind or a field is unknown, or a value is outside its range.

        Examples
        --------
        >>> from sparse_ref_attn.schedules import Constant
        >>> Budget.from_dict(Constant(0.25).to_dict())
        Constant(keep=0.25, per='reference')
        """
        values = dict(data) if isinstance(data, Mapping) else {"kind": data}
        kind = values.pop("kind", None)
        if not is_one_of(kind, Budget._kinds):
            raise ConfigError(f"a budget's kind must be one of {sorted(Budget._kinds)}, got {kind!r}")
        for name, value in values.items():
            if isinstance(value, dict):
                values[name] = Budget.from_dict(value)
            elif isinstance(value, list):
                values[name] = tuple(value)
        made = Budget._kinds[kind]
        known = {f.name for f in fields(made)}  # type: ignore[arg-type]
        if not values.keys() <= known:
            raise ConfigError(f"fields of {kind} must be among {sorted(known)}, got {sorted(values)}")
        try:
            return made(**values)
        except TypeError as error:
            raise ConfigError(f"{kind} must be given all its fields {sorted(known)}, got {sorted(values)}") from error


@dataclass(frozen=True)
class Piecewise(Budget):
    """Another budget, held constant within equal parts of the run's progress; see `Budget.piecewise`.

    Parameters
    ----------
    budget : Budget
        Read at the middle of each part. Its `per` must be this one's.
    pieces : int
        Parts, >= 1.
    """

    budget: Budget
    pieces: int
    per: str = "reference"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.budget, Budget) or self.budget.per != self.per:
            raise ConfigError(f"Piecewise must hold a budget with per={self.per!r}, got {self.budget!r}")
        if not is_int(self.pieces, 1):
            raise ConfigError(f"pieces must be an int >= 1, got {self.pieces!r}")

    @property
    def varies(self) -> str:
        return "never" if self.pieces == 1 or self.budget.varies == "never" else "pieces"

    @property
    def needs_mass(self) -> bool:
        return self.budget.needs_mass

    def counts(self, clock: Clock, sizes: Sequence[int], mass: Sequence[Tensor] | None = None) -> tuple[int, ...]:
        piece = min(int(clock.progress * self.pieces), self.pieces - 1)
        return self.budget.counts(replace(clock, progress=(piece + 0.5) / self.pieces), sizes, mass)

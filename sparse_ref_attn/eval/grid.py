"""Which pictures are made of each example: methods at shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..config import SparseRef
from ..errors import ConfigError
from ..estimation import at_share
from .examples import Mask
from .methods import methods
from .models import EvalModel
from .rival_settings import is_rival, rival_setting
from .settings import Setting

__all__ = ["BASE", "Grid", "Plan"]

BASE = ("dense", 1.0)
"""The cell of the dense run, which all others of an example and seed are compared with."""


class Plan(Protocol):
    """What is made of each example: a `Grid`, or a `Sweep`."""

    @property
    def seeds(self) -> int: ...
    @property
    def families(self) -> tuple[str, ...] | None: ...
    @property
    def count(self) -> int | None: ...
    @property
    def mean_over(self) -> str: ...

    def cells(self) -> list[tuple[str, float]]:
        """Names and shares, `BASE` first."""
        ...

    def setting(self, model: EvalModel, name: str, keep: float, seed: int, masks: Sequence[Mask] | None) -> Setting:
        """What a cell runs on a model; raises ConfigError where it cannot."""
        ...


@dataclass(frozen=True)
class Grid:
    """Which pictures are made of each example.

    Parameters
    ----------
    names : tuple of str
        Methods by `method_name`, `vocabulary.RIVALS` and `vocabulary.COMBINED`; "dense" is always among what runs.
    keeps : tuple of float
        Shares in (0, 1]; at 1 every method is dense.
    seeds : int
        Noises of each example: 0, 1, ...
    families : tuple of str, optional
        Of the data set; default all.
    count : int, optional
        Examples of each family, from the first; default all.
    mean_over : {"dropping", "run"}
        The steps over which a share is the mean: those that drop tokens, or all, a dense one included.

    Raises
    ------
    ConfigError
        For an unknown method, a share outside (0, 1], no seed, or another `mean_over`.

    Examples
    --------
    >>> Grid(("edges", "ReCAST flat"), (1.0, 0.25)).cells()
    [('dense', 1.0), ('edges', 0.25), ('ReCAST flat', 0.25)]
    """

    names: tuple[str, ...]
    keeps: tuple[float, ...]
    seeds: int = 1
    families: tuple[str, ...] | None = None
    count: int | None = None
    mean_over: str = "dropping"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {self.seeds}")
        if self.mean_over not in ("dropping", "run"):
            raise ConfigError(f"mean_over must be dropping or run, got {self.mean_over!r}")
        for keep in self.keeps:
            methods(keep, [name for name in self.names if not is_rival(name)], mask=np.ones((1, 1)))

    def cells(self) -> list[tuple[str, float]]:
        """Method and share of each picture of an example and seed, the dense one first."""
        sparse = dict.fromkeys(keep for keep in self.keeps if keep < 1)
        return [BASE, *((name, keep) for name in dict.fromkeys(self.names) for keep in sparse)]

    def setting(self, model: EvalModel, name: str, keep: float, seed: int, masks: Sequence[Mask] | None) -> Setting:
        """What one of `cells` runs on a model.

        Raises
        ------
        ConfigError
            If the share is too small for a dense step of it, or for a step cache to compute less than all.
        """

        def member(method: str, steps: int) -> SparseRef:
            def family(amount: float) -> SparseRef:
                return methods(amount, [method], seed=seed, steps=steps, mask=masks)[method]

            whole = self.mean_over == "run"
            return at_share(model.pipe.transformer, family, keep, steps) if whole else family(keep)

        if is_rival(name):
            return rival_setting(name, keep, model.steps, member)
        return Setting(config=member(name, model.steps))

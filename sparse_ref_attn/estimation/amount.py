"""A preset and how much it keeps, before the model and its steps are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..config import SparseRef
from ..errors import ConfigError
from ..presets import ReCAST, SparseContext
from .share import at_share

__all__ = ["Amount"]


class Amount:
    """A preset and how much it keeps; the budget is known once the model and the number of steps are.

    Parameters
    ----------
    preset : {"recast", "sparse-context"}
    keep : float, int or None
        A share in (0, 1]: the mean over all steps. Tokens: of each reference at every step that drops any. None: the
        preset's own budget.
    settings : mapping
        Further arguments of the preset.

    Raises
    ------
    ConfigError
        For what no run could do, before any model is built.
    """

    def __init__(self, preset: str, keep: float | int | None, settings: Mapping[str, Any]) -> None:
        self._keep, family = keep, FAMILIES[preset]
        if isinstance(keep, int) and preset == "recast":
            raise ConfigError(f"keep of recast must be a share such as 0.25 or 25%, got {keep} tokens")
        if isinstance(keep, float) and not 0 < keep <= 1:
            raise ConfigError(f"keep must be a share in (0, 1] or a number of tokens of at least 1, got {keep:g}")
        self.family: Callable[[Any], SparseRef] = lambda amount: family(amount, settings)
        self._config = self.family(keep)

    def config(self, transformer: nn.Module, steps: int) -> SparseRef:
        """The configuration of a run of `steps` steps.

        Raises
        ------
        ConfigError
            As `at_share`.
        """
        if not isinstance(self._keep, float):
            return self._config
        return at_share(transformer, self.family, self._keep, steps)


def _sparse_context(keep: float | int | None, settings: Mapping[str, Any]) -> SparseRef:
    return SparseContext(**settings) if keep is None else SparseContext(keep, **settings)


def _recast(keep: float | None, settings: Mapping[str, Any]) -> SparseRef:
    """The paper's ramp from a quarter of its top, which then rises to all as far as it must."""
    if keep is None:
        return ReCAST(**settings)
    top = 2 * keep
    return ReCAST(top / 4, top, **settings) if top <= 1 else ReCAST(0.25 + 0.75 * (top - 1), 1.0, **settings)


FAMILIES = {"recast": _recast, "sparse-context": _sparse_context}

"""``--preset`` and ``--keep``: how many tokens a run keeps."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..checks import is_int
from ..config import SparseRef
from ..errors import ConfigError
from ..estimation import at_share
from ..presets import ReCAST, SparseContext
from . import execution

__all__ = ["Amount", "settings"]


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
        if is_int(keep) and preset == "recast":
            raise ConfigError(f"--keep of recast must be a share such as 0.25 or 25%, got {keep} tokens")
        if isinstance(keep, float) and not 0 < keep <= 1:
            raise ConfigError(f"--keep must be a share in (0, 1] or a number of tokens of at least 1, got {keep:g}")
        self._family: Callable[[Any], SparseRef] = lambda amount: family(amount, settings)
        self._config = self._family(keep)

    def config(self, transformer: nn.Module, steps: int) -> SparseRef:
        """The configuration of a run of `steps` steps.

        Raises
        ------
        ConfigError
            As `at_share`.
        """
        if not isinstance(self._keep, float):
            return self._config
        return at_share(transformer, self._family, self._keep, steps)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a preset that were given, beside how much it keeps."""
    given = {name: value for name in ("task", "select") if (value := getattr(options, name)) is not None}
    return given | execution.settings(options)


def _sparse_context(keep: float | int | None, settings: Mapping[str, Any]) -> SparseRef:
    return SparseContext(**settings) if keep is None else SparseContext(keep, **settings)


def _recast(keep: float | None, settings: Mapping[str, Any]) -> SparseRef:
    """The paper's ramp from a quarter of its top, which then rises to all as far as it must."""
    if keep is None:
        return ReCAST(**settings)
    top = 2 * keep
    return ReCAST(top / 4, top, **settings) if top <= 1 else ReCAST(0.25 + 0.75 * (top - 1), 1.0, **settings)


FAMILIES = {"recast": _recast, "sparse-context": _sparse_context}

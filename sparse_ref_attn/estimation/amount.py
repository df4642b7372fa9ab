"""A preset and how much it keeps, before the model and its steps are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..config import SparseRef
from ..errors import ConfigError
from ..presets import CHOSEN, PRESETS, ReCAST, SparseContext
from ..vocabulary import DEFAULT_PRESET, PAPERS
from .share import at_share

__all__ = ["Amount", "preset_of"]


class Amount:
    """A preset and how much it keeps; the budget is known once the model and the number of steps are.

    Parameters
    ----------
    preset : str, optional
        Of `vocabulary.PRESETS`; default `preset_of` the others.
    keep : float, int or None
        A share in (0, 1]: the mean over all steps. Tokens: of each reference at every step that drops any. None: the
        preset's own budget, and always with those that keep every token.
    settings : mapping
        Further arguments of the preset.

    Raises
    ------
    ConfigError
        For what no run could do, before any model is built.
    """

    def __init__(self, preset: str | None, keep: float | int | None, settings: Mapping[str, Any]) -> None:
        preset = preset_of(keep, settings) if preset is None else preset
        if keep is not None and preset in CHOSEN:
            raise ConfigError(
                f"keep must come with a preset that drops tokens ({', '.join(PAPERS)}), got {keep} with {preset}, "
                "which stores every reference token and reads all of them"
            )
        self.preset, self._keep, family = preset, keep, FAMILIES[preset]
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


def _chosen(preset: str) -> Callable[[Any, Mapping[str, Any]], SparseRef]:
    return lambda _, settings: PRESETS[preset](**settings)


FAMILIES: Mapping[str, Callable[[Any, Mapping[str, Any]], SparseRef]] = {
    **{name: _chosen(name) for name in CHOSEN}, "recast": _recast, "sparse-context": _sparse_context,
}  # fmt: skip
"""By preset, the configuration of an amount and further settings."""


def preset_of(keep: float | int | None, settings: Mapping[str, Any]) -> str:
    """The preset that is meant where none is named.

    Parameters
    ----------
    keep : float, int or None
    settings : mapping
        Arguments of a preset that were given.

    Examples
    --------
    >>> preset_of(None, {}), preset_of(None, {"execute": "cache", "refresh": None}), preset_of(0.25, {})
    ('balanced', 'balanced', 'recast')
    >>> preset_of(None, {"select": "edges"}), preset_of(None, {"execute": "cache", "per": "tile"})
    ('recast', 'recast')
    """
    stores = settings.get("execute", "cache") == "cache" and set(settings) <= STORING
    return DEFAULT_PRESET if keep is None and stores else PAPERS[0]


STORING = frozenset({"execute", "refresh", "isolated", "seed"})
"""Settings that say nothing about which tokens are kept."""

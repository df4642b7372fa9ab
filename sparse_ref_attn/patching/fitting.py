"""Whether a configuration fits a model, told before anything is patched."""

from __future__ import annotations

from torch import nn

from ..adapters.base import Adapter
from ..adapters.model_words import model_words
from ..config import SparseRef
from ..run import Probing
from ..selection import Selector
from .execution.joint import check_cache
from .execution.whole import check_whole

__all__ = ["fit"]


def fit(config: SparseRef, adapter: Adapter, transformer: nn.Module) -> Probing:
    """What a run measures of a model that the configuration fits.

    Raises
    ------
    IncompatibleError
        If the model cannot do what the configuration asks for.
    ConfigError
        If a setting names a block that it does not have, or the selector was trained for another model.
    """
    if config.from_block or config.profile == "in_flight":
        adapter.check_depth(transformer)
    probing = Probing.of(config, [site.kind for site in adapter.sites(transformer)])
    if probing.probes:
        adapter.check_measurable(transformer)
    check_cache(config, adapter, transformer)
    if adapter.cache is not None and adapter.cache.whole:
        check_whole(config, probing, adapter)
    if isinstance(config.select, Selector):
        config.select.check(model_words(adapter, transformer))
    return probing

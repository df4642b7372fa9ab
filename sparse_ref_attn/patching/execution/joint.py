"""Which attention layers of a model are joint attention that can be answered, so that keys can be stored and read."""

from __future__ import annotations

from torch import nn

from ...adapters.base import Adapter
from ...config import SparseRef
from ...errors import ConfigError, IncompatibleError
from ...execution import Cache

__all__ = ["check_cache", "joint_layers"]


def check_cache(config: SparseRef, adapter: Adapter, transformer: nn.Module) -> None:
    """Raise where keys and values of the references cannot be stored, or other layers are named than there are."""
    if not isinstance(config.execute, Cache):
        return
    sites, name = joint_layers(adapter, transformer), config.execute.name
    if not sites:
        raise IncompatibleError(
            f'execute="{name}" stores keys and values of the references, for which {adapter.name}\'s attention must be '
            "known and go through processors that dispatch to attention backends, or be named to a PlainAdapter: "
            'attention=["single"] * len(blocks). Use execute="tokens"'
        )
    if config.layers is not None and len(config.layers) != len(sites):
        raise ConfigError(
            f"layers must be a factor for each of the {len(sites)} attention layers, got {len(config.layers)}"
        )


def joint_layers(adapter: Adapter, transformer: nn.Module) -> list[int]:
    """Which of the adapter's attention sites are joint attention that can be answered; none unless all of them."""
    sites = adapter.sites(transformer)
    if not adapter.routable(transformer):
        return []
    return [i for i, site in enumerate(sites) if site.kind != "other"]

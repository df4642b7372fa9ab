"""Model families: where their tokens lie, and how rows are dropped from their calls."""

from .base import Adapter, register_adapter, supported
from .flux import FluxAdapter
from .flux2 import Flux2Adapter
from .plain import PlainAdapter
from .qwen import QwenImageAdapter

__all__ = ["Adapter", "PlainAdapter", "register_adapter", "supported"]

for _adapter in (FluxAdapter(), Flux2Adapter(), QwenImageAdapter()):
    for _name in _adapter.classes:
        register_adapter(_name, _adapter)

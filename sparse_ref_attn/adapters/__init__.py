"""Model families, and the two verbs that patch them."""

from .base import Adapter, register_adapter, supported
from .flux import FluxAdapter
from .flux2 import Flux2Adapter
from .patching import PatchHandle, patch, patched
from .plain import PlainAdapter
from .qwen import QwenImageAdapter

__all__ = ["Adapter", "PatchHandle", "PlainAdapter", "patch", "patched", "register_adapter", "supported"]

for _adapter in (FluxAdapter(), Flux2Adapter(), QwenImageAdapter()):
    for _name in _adapter.classes:
        register_adapter(_name, _adapter)

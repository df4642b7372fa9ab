"""One softmax over dense keys and the kept rows of a reference bank."""

from .api import gather_attention
from .host_offsets import HostOffsets

__all__ = ["HostOffsets", "gather_attention"]

"""What the library asks of a model, and what answers for most: where tokens lie, how rows are dropped, masks, depth.

The families themselves stand in `models`.
"""

from .base import Adapter
from .plain import PlainAdapter

__all__ = ["Adapter", "PlainAdapter"]

"""What the library asks of a model, and what answers for most: where tokens lie, how rows are dropped, masks, depth.

The families themselves stand in `models`.
"""

from .base import Adapter
from .function_model import FunctionModel
from .plain import PlainAdapter
from .position_ids import references_from_ids

__all__ = ["Adapter", "FunctionModel", "PlainAdapter", "references_from_ids"]

"""Reference keys and values kept between steps, and between runs. Nothing here knows a model."""

from .ranked import RankedCache
from .saved import ReferenceCache

__all__ = ["RankedCache", "ReferenceCache"]

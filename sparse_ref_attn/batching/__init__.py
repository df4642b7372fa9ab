"""Batches in which every item has references, sizes and kept tokens of its own."""

from .api import batch
from .result import BatchResult

__all__ = ["BatchResult", "batch"]

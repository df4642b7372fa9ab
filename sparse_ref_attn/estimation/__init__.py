"""What a run will cost, before it runs."""

from .api import Estimate, RunMemory, estimate

__all__ = ["Estimate", "RunMemory", "estimate"]

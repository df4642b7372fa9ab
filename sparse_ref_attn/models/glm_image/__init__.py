"""GLM-Image."""

from .adapter import GlmImageAdapter

__all__ = ["FAMILY", "GlmImageAdapter"]

FAMILY = GlmImageAdapter()

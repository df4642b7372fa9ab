"""Z-Image-Omni."""

from .adapter import ZImageAdapter

__all__ = ["FAMILY", "ZImageAdapter"]

FAMILY = ZImageAdapter()

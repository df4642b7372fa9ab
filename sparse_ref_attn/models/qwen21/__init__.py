"""Qwen-Image-2.1."""

from .adapter import Qwen21Adapter

__all__ = ["FAMILY", "Qwen21Adapter"]

FAMILY = Qwen21Adapter()

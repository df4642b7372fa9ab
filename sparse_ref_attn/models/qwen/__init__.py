"""Qwen-Image-Edit, Edit-Plus and the 2511 form, and Qwen-Image-Layered."""

from .adapter import QwenImageAdapter, frequencies

__all__ = ["FAMILY", "QwenImageAdapter", "frequencies"]

FAMILY = QwenImageAdapter()

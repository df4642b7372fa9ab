"""A patched pipeline: the hooks, the run they follow, the ways to save work, and the way back."""

from .api import patch, patched, transformer_of
from .handle import PatchHandle

__all__ = ["PatchHandle", "patch", "patched", "transformer_of"]

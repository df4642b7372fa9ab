"""One softmax over dense keys and the kept rows of a reference bank."""

from .api import gather_attention

__all__ = ["gather_attention"]

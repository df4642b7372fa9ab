"""Attention that queries pay to each of a span of keys, without storing the score matrix."""

from .api import attention_mass

__all__ = ["attention_mass"]

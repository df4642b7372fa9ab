"""Attention that queries pay to each of a span of keys, without storing the score matrix."""

from .api import attention_mass
from .varlen import attention_mass_varlen

__all__ = ["attention_mass", "attention_mass_varlen"]

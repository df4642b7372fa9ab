"""The public door to the ops.

Letters, in the whole library: B batch, S joint sequence, N queries, M dense keys, R reference
rows, K kept rows, H heads, G key/value heads, C head dim, T packed tokens, D features.
"""

from .ops.attention_mass import attention_mass, attention_mass_varlen
from .ops.gather_attention import HostOffsets, gather_attention
from .ops.pack_rows import pack_rows, unpack_rows

__all__ = ["HostOffsets", "attention_mass", "attention_mass_varlen", "gather_attention", "pack_rows", "unpack_rows"]

"""Take kept rows out of a token axis, and put them back."""

from .api import pack_rows, unpack_rows

__all__ = ["pack_rows", "unpack_rows"]

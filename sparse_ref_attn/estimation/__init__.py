"""What a run will cost, before it runs."""

from .amount import Amount, preset_of
from .api import estimate, estimate_of, token_side
from .result import Estimate, RunMemory
from .share import at_share, at_share_of_sites

__all__ = [
    "Amount",
    "Estimate",
    "RunMemory",
    "at_share",
    "at_share_of_sites",
    "estimate",
    "estimate_of",
    "preset_of",
    "token_side",
]

"""Pictures of a finished run: which reference tokens were kept, their scores, the budget over steps."""

from .kept import overlay, save_overlay
from .strip import save_budget_strip
from .tile_reads import tile_overlay

__all__ = ["overlay", "save_budget_strip", "save_overlay", "tile_overlay"]

"""Reference keys and values kept between steps, and between runs. Nothing here knows a model."""

from .grid_tiling import Cells, Tiling
from .ranked_cache import RankedCache
from .saved import ReferenceCache
from .tile_ranking import TileRanking, TileSelection
from .tiled_cache import TiledCache

__all__ = ["Cells", "RankedCache", "ReferenceCache", "TileRanking", "TileSelection", "TiledCache", "Tiling"]

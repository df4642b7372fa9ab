"""Reference keys and values kept between steps, and between runs. Nothing here knows a model."""

from .ranked import RankedCache
from .saved import ReferenceCache
from .tile_ranking import TileRanking, TileSelection
from .tiled import TiledCache
from .tiling import Cells, Tiling

__all__ = ["Cells", "RankedCache", "ReferenceCache", "TileRanking", "TileSelection", "TiledCache", "Tiling"]

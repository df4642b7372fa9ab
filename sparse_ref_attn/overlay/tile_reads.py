"""Where a tile of the generation looks, and how often each reference token of a layer is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from ..record import RunRecord, TileRecord
from ..reference_cache.grid_tiling import squares
from .canvas import FAINT, GAP, INK, MARGIN, PAPER, WIDTH, across, down, page, percent, words
from .kept import NEUTRAL, OUTLINE, _fit, _heat_image, _kept_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["tile_overlay"]

Tile = int | tuple[int, int]
TALLEST = 560  # pixels of a reference
MAP = 260  # pixels of the generation's side


def tile_overlay(record: RunRecord, layer: int, tile: Tile | None = None) -> Image.Image:
    """Draw what the tiles of a run's last cached step read in one attention layer.

    Each reference is drawn with the tokens that `tile` read in their own colours, and with the heat of how often each
    is read: the share of the generation's tokens whose tile does. A map shows where in the generation the tile lies.
    Of a batch, the first item.

    Parameters
    ----------
    record : RunRecord
        A finished run with ``Cache(per="tile")``.
    layer : int
        Attention layer in order of execution, from 0.
    tile : int or (int, int), optional
        Number of a tile in reading order, or its row and column, from 0. Default: the layer alone.

    Returns
    -------
    PIL.Image.Image
        RGB, 1400 pixels wide.

    Raises
    ------
    ConfigError
        If no tile of the run read tokens of its own, or there is no such layer or tile.

    Examples
    --------
    >>> import torch
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> run = RunRecord(TokenLayout(8, 0, (0, 4), (Reference(4, 4, (2, 2)),)), 1, 1)
    >>> run.tiles = TileRecord((2, 2), side=2, cell=0, text=False)
    >>> run.tiles.reads[0] = (torch.tensor([3, 1]), (0, 2))
    >>> tile_overlay(run, layer=0, tile=(0, 0)).width
    1400
    """
    tiles = _tiles(record, layer)
    number = None if tile is None else _number(tiles, tile)
    often = _often(record, tiles, layer)
    read = np.zeros(len(often), bool) if number is None else _read(tiles, layer, number, len(often))
    inner = WIDTH - 2 * MARGIN
    height, width = tiles.shape
    if number is None:
        title = f"How often each reference token is read in layer {layer}"
        line = f"by {height} x {width} tiles of {tiles.side} x {tiles.side} generation tokens"
    else:
        at = f"row {number // width}, column {number % width}"
        title = f"Reference tokens that the tile in {at} reads in layer {layer}"
        line = f"{int(read.sum()):,} of {len(read):,} ({percent(read.mean())}); tile {number} of {height * width}"
    rest = f", the others by the means of {tiles.cell} x {tiles.cell} cells" if tiles.cell else ""
    head = down([words(title, 30, inner), words(line + rest, 18, inner, FAINT)], 4)
    generation = None if number is None else down([words("generation", 18, MAP), _map(tiles, number)], 8)
    room = inner if generation is None else inner - generation.width - 2 * GAP
    rows, first = [], 0
    for i, reference in enumerate(record.layout.references):
        part = slice(first, first + reference.length)
        grid = reference.grid or (1, reference.length)
        own = None if number is None else read[part].reshape(grid)
        rows.append(_reference(record, i, own, often[part].reshape(grid), room))
        first += reference.length
    pictures = down(rows, GAP)
    if generation is not None:
        pictures = across([_as_high(generation, pictures.height), pictures], 2 * GAP)
    return page(down([head, pictures], GAP))


def _tiles(record: RunRecord, layer: int) -> TileRecord:
    tiles = record.tiles
    if tiles is None or not tiles.reads:
        raise ConfigError(
            'layer must come with a run whose tiles read tokens of their own, Cache(per="tile") with a budget below '
            f"every token, got {record.config.get('execute', 'another run')}"
        )
    if isinstance(layer, bool) or not isinstance(layer, int) or layer not in tiles.reads:
        raise ConfigError(f"layer must be an int in [0, {len(tiles.reads)}), got {layer!r}")
    return tiles


def _number(tiles: TileRecord, tile: object) -> int:
    height, width = tiles.shape
    place = tile if isinstance(tile, tuple) else divmod(tile, width) if isinstance(tile, int) else ()
    known = len(place) == 2 and all(isinstance(x, int) and not isinstance(x, bool) for x in (*place, tile)[:2])
    if not known or not (0 <= place[0] < height and 0 <= place[1] < width):
        raise ConfigError(
            f"tile must be a number in [0, {height * width}), or the row and column of one of {height} x {width} "
            f"tiles, got {tile!r}"
        )
    return int(place[0] * width + place[1])


def _read(tiles: TileRecord, layer: int, number: int, tokens: int) -> np.ndarray:
    read = np.zeros(tokens, bool)
    read[tiles.read(layer, number).cpu().numpy()] = True
    return read


def _often(record: RunRecord, tiles: TileRecord, layer: int) -> np.ndarray:
    """Share of the generation's tokens whose tile reads each reference token."""
    sizes = np.bincount(squares(tiles.grid, tiles.side).numpy())
    often = np.zeros(record.layout.reference_tokens)
    for number, size in enumerate(sizes):
        often[tiles.read(layer, number).cpu().numpy()] += size
    return often / sizes.sum()


def _as_high(image: Image.Image, height: int) -> Image.Image:
    """An image with paper below it, up to a height."""
    from PIL import Image

    out = Image.new("RGB", (image.width, max(height, image.height)), PAPER)
    out.paste(image, (0, 0))
    return out


def _map(tiles: TileRecord, number: int) -> Image.Image:
    """The generation's tiles, the chosen one filled."""
    from PIL import Image, ImageDraw

    height, width = tiles.grid
    scale = MAP / max(height, width)
    image = Image.new("RGB", (round(width * scale) + 1, round(height * scale) + 1), NEUTRAL[0])
    draw = ImageDraw.Draw(image)
    down_, across_ = tiles.shape
    for n in (*range(down_ * across_), number):
        y, x = (n // across_ * tiles.side, n % across_ * tiles.side)
        box = [round(v * scale) for v in (x, y, min(x + tiles.side, width), min(y + tiles.side, height))]
        draw.rectangle(box, fill=OUTLINE if n == number else None, outline=INK if n == number else PAPER)
    return image


def _reference(record: RunRecord, i: int, read: np.ndarray | None, often: np.ndarray, width: int) -> Image.Image:
    """Caption, what a tile read of one reference, and the heat of how often its tokens are read."""
    count, between = 1 if read is None else 2, GAP // 2
    size = _fit(often.shape, ((width - between * (count - 1)) // count, TALLEST))
    pictures = [_heat_image(often, size)]
    caption = f"reference {i + 1}, {often.shape[0]} x {often.shape[1]} tokens"
    if read is not None:
        pictures.insert(0, _kept_image(record, i, read, size))
        caption += f": {int(read.sum()):,} read by this tile; right: how often each is read by all"
    scale = f"dark: read by {percent(often.min())} of the generation's tokens; bright: by {percent(often.max())}"
    return down([words(caption, 18, width), words(scale, 14, width, FAINT), across(pictures, between)], 6)

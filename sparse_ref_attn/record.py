"""What happened in one run: plain data, filled by the session, read by the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .types import RefSelection, TokenLayout

__all__ = ["BlockAttention", "RunRecord", "Stability", "StepRecord", "TileRecord", "mean_over_blocks"]


@dataclass
class StepRecord:
    """One denoising step.

    Parameters
    ----------
    index : int
        Step number, 0 first.
    kind : {"dense", "profile", "in_flight", "sparse", "cached"}
        "profile" is a dense step whose attention was measured; "in_flight" was measured before
        `from_block` and dropped tokens from there on; "cached" runs without reference
        rows, on reference K/V kept from an earlier step.
    kept : int
        Reference tokens that took part, R on a dense step.
    calls : int
        Transformer calls (2 with sequential classifier-free guidance).
    seconds : callable returning float
        Time inside the transformer, all calls (reads CUDA events, so it may sync).
    host_seconds : float
        Time of the library's own host code.
    selection : RefSelection, optional
        Which tokens; None when all.
    from_block : int
        Block from which on only these took part; all tokens ran through the blocks before it.
    layers : tuple of int, optional
        Reference tokens that each attention layer read, where that differs from `kept`.
    cache_bytes : int
        Reference K/V held during the step, with the room in which a call's own rows stand beside them.
    drift : Tensor, shape (layers,), float32, optional
        How far each layer's stored keys and values moved since the full step before: norm of the difference over norm,
        the larger of keys and values. None in other steps, and in the first full one.
    means : int
        Means of cells that each query read beside the kept tokens.
    read : Tensor, shape (references, 2), float32, optional
        Where each tile reads by its own ranking: of each reference the tokens that a query reads, and the share of its
        mass that these had at the last full step; means over queries, layers and items.
    """

    index: int
    kind: str
    kept: int
    calls: int = 0
    seconds: Callable[[], float] = field(default=lambda: 0.0, repr=False)
    host_seconds: float = 0.0
    selection: RefSelection | None = field(default=None, repr=False)
    from_block: int = 0
    layers: tuple[int, ...] | None = field(default=None, repr=False)
    cache_bytes: int = 0
    drift: Tensor | None = field(default=None, repr=False)
    means: int = 0
    read: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Stability:
    """How much of the ranking was left when the run ranked again.

    Parameters
    ----------
    step : int
        The step whose attention was measured.
    spearman : tuple of float
        Rank correlation with the ranking before, one a reference, in [-1, 1]; NaN where a ranking has all tokens
        alike, as that of a single token does.
    overlap : float
        Share of the tokens kept at that step that the later ranking keeps too, in [0, 1].
    """

    step: int
    spearman: tuple[float, ...]
    overlap: float


@dataclass
class BlockAttention:
    """Generation-to-reference attention of one block at one step, per reference and head.

    Where tiles measure (``Cache(per="tile")``) there is one head, the mean of all.

    Parameters
    ----------
    step, block : int
        Where it was measured; blocks are counted in order of execution.
    mass : Tensor, shape (references, H), float32
        Attention that a generation token pays to the reference, in [0, 1].
    entropy : Tensor, shape (references, H), float32
        Entropy of the normalised mass over the reference's tokens, in bits.
    top_quarter : Tensor, shape (references, H), float32
        Share of the reference's mass held by its top 25 % tokens, in [0.25, 1].
    """

    step: int
    block: int
    mass: Tensor
    entropy: Tensor
    top_quarter: Tensor


@dataclass(frozen=True)
class TileRecord:
    """What each tile of generation tokens read in the last cached step that read a part.

    Parameters
    ----------
    grid : (int, int)
        Height and width of the generation in tokens.
    side, cell : int
        Of a tile, and of a cell whose mean stands for what is not read; 0 for none.
    text : bool
        Whether the first list of an item is that of its text rows.
    reads : dict of int to (Tensor, tuple of int)
        Of each attention layer the reference tokens that the tiles read, int32, those of item 0 first, and where each
        tile's begin.
    """

    grid: tuple[int, int]
    side: int
    cell: int
    text: bool
    reads: dict[int, tuple[Tensor, tuple[int, ...]]] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.grid[0] // self.side), -(-self.grid[1] // self.side)

    def read(self, layer: int, tile: int) -> Tensor:
        """The reference tokens that a tile of item 0 read in a layer, counted through all references, best first."""
        indices, offsets = self.reads[layer]
        at = tile + int(self.text)
        return indices[offsets[at] : offsets[at + 1]]


@dataclass
class RunRecord:
    """One generation.

    Parameters
    ----------
    layout : TokenLayout
        Of the first call with references.
    batch : int
        Batch items in one call.
    total_steps : int
        Steps that the run was to have.
    steps : list of StepRecord
        Steps that ran, in order.
    scores : list of Tensor, shape (R_i,)
        The final ranking scores of each reference; None before ranking.
    mass : list of Tensor, shape (R_i,)
        Profiled generation-to-reference mass of each reference (ReCAST eq. 3); None if not profiled.
    pixels : list of (Tensor or None)
        Per reference what the VAE encoded, (b, 3, H, W) in [-1, 1].
    attention : list of BlockAttention
        The paper's diagnostics, one entry per profiled step and block.
    scoring_flops : float
        Work of measuring attention in the profiling steps, beyond the dense steps themselves: a product with the
        references' own keys where the step's attention gave its log-sum-exp, with every key where it did not.
    notes : list of str
        What the library decided on its own, in words (the guard, a fallback).
    config : dict
        The configuration, as JSON types.
    blocks : int
        Blocks of the transformer; 0 when not known.
    stability : list of Stability
        One entry each time the run ranked again.
    dense_cache_bytes : int
        Bytes of every reference token's K/V; 0 where none are kept.
    exactness : str
        What kept K/V are in later steps: "exact", "fixed time" or "drifting" (`Adapter.exactness`); "" where none are.
    isolated : tuple of int, optional
        Reference tokens of each call by which the references ran by themselves, none where an earlier run's keys and
        values were read; None where they run with the picture.
    passes : tuple of int
        Reference tokens of each call by which the model itself runs its references before the steps, one item each.
    tiles : TileRecord, optional
        Where each tile of the generation reads by its own ranking, what they read last.
    """

    layout: TokenLayout
    batch: int
    total_steps: int
    steps: list[StepRecord] = field(default_factory=list)
    scores: list[Tensor] | None = None
    mass: list[Tensor] | None = None
    pixels: list[Tensor | None] = field(default_factory=list)
    attention: list[BlockAttention] = field(default_factory=list)
    scoring_flops: float = 0.0
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    stability: list[Stability] = field(default_factory=list)
    dense_cache_bytes: int = 0
    exactness: str = ""
    blocks: int = 0
    isolated: tuple[int, ...] | None = None
    passes: tuple[int, ...] = ()
    tiles: TileRecord | None = field(default=None, repr=False)

    @property
    def mean_tokens(self) -> float:
        """Reference tokens that took part, mean over the steps and blocks."""
        return sum(self.mean_kept(step) for step in self.steps) / len(self.steps)

    @property
    def with_the_picture(self) -> bool:
        """Whether the unpatched model runs its references in every step, where keys and values of them are stored."""
        return self.isolated is not None or self.exactness in ("drifting", "fixed time")

    def mean_kept(self, step: StepRecord) -> float:
        """Reference tokens that took part in `step`, mean over the blocks."""
        return mean_over_blocks(step.kept, self.layout.reference_tokens, step.from_block, self.blocks)


def mean_over_blocks(kept: int, tokens: int, from_block: int, blocks: int) -> float:
    """Mean over `blocks` of `tokens` before block `from_block` and `kept` from there on.

    Examples
    --------
    >>> mean_over_blocks(kept=100, tokens=400, from_block=2, blocks=8)
    175.0
    """
    return kept + (tokens - kept) * from_block / blocks if from_block else kept

"""Stored reference keys and values, which steps without reference rows read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import is_one_of, numbers
from ..errors import ConfigError
from ..isolation import Isolation
from ..refresh import Refresh
from .tokens import check_every

__all__ = ["CACHE_ROWS", "LAYERS", "PERS", "RESTS", "Cache"]

CACHE_ROWS = ("budget", "all")
PERS = ("run", "tile")
RESTS = ("means", "weighted", "none")
LAYERS = 'layers must be factors in (0, 1], one an attention layer, with execute="cache" or "both", got {!r} with {!r}'


@dataclass(frozen=True)
class Cache:
    """References run now and then; the steps between read the keys and values that were stored of them.

    A *full* step runs the reference rows and stores each layer's keys and values, after QK-norm and RoPE; a *cached*
    one runs text and generation rows alone, and each attention reads its own rows and the stored ones that the budget
    keeps, in the order of the ranking; with a budget of 1.0 everything, which is best where references drift: one
    ranking serves no layer well. Where a model's references see neither the time nor the generation (FLUX.2
    Klein-KV), what is stored is exact, the pipeline itself computes it once, and `refresh` has no meaning.

    Parameters
    ----------
    first : {"all", "kept"}
        Reference tokens that a full step computes: every one, of which each cached step reads the ranked ones that its
        budget keeps, or only those that the budget keeps.
    rows : {"budget", "all"}
        Which rows are held between steps: those of the largest budget still to come, or all.
    layers : tuple of float, optional
        Factors in (0, 1] on the budget, one for each attention layer in order of execution: a layer reads that share of
        the step's kept keys and values, its best ones, rounded up. Not with `rerank_every`.
    rerank_every : int, optional
        Measure and rank again every n steps after the last profiling step: such a step reads all stored keys, at the
        cost of the scoring alone (see ``query_stride`` of the selector), and all rows are held. Only with
        ``first="all"``. Default never.
    refresh : Refresh, optional
        The full steps: `refresh.Every`, `At`, `Never` or `Drift`. Steps whose attention is measured before the first
        ranking are full besides. Default `refresh.standard`: at quarters of the run, or at halves of one of up to
        eight steps.
    per : {"run", "tile"}
        Who ranks the tokens that the budget keeps: one ranking for the whole run, or each tile of generation tokens
        in each layer, by the attention that it paid at the last full step. Text rows then read by the sum over their
        layer's tiles. Every full step measures the attention of every layer, at the cost of one product more
        with the reference keys. Needs ``AttentionMass`` as selector, whose blocks and steps still make the run's own
        scores, and a model that tells the grids of the generation and of the references. Not with `layers`,
        `rerank_every` or ``first="kept"``; masks must be of keys.
    tile : int
        With ``per="tile"``, the side of a tile in generation tokens, >= 1; tiles at the edges are smaller.
    rest : {"means", "weighted", None}
        With ``per="tile"``, how a tile sees the tokens that it does not read: by the mean key and value of each cell
        of a reference's grid, counted as often as the cell has such tokens, or not at all. "weighted" means are by the
        attention that all of the generation paid the tokens at the last full step.
    cell : int
        Side of a cell in reference tokens, >= 1; cells at the edges are smaller.

    isolated : bool or Isolation, optional
        Whether the references run by themselves, once, before the first step, and every step reads what they stored;
        True: as the weights say that they were trained, else ``Isolation()``. What is stored then depends on the
        references alone, and holds for any step, prompt and seed: `PatchHandle.reuse` takes it from an earlier run. For
        weights that were trained so (`IsolateReferences`); others lose what they read of the picture in their
        references. Default as the weights say, where ``sra train`` wrote it beside them, in which case `refresh` has no
        meaning. Not with `refresh`, ``first="kept"`` or ``per="tile"``.

    Raises
    ------
    ConfigError
        For a value outside its range, and for two that exclude one another.

    Notes
    -----
    With ``per="tile"`` cached steps attend by `functional.gather_attention` whatever attention backend was chosen for
    the model. Where a gradient is wanted of such a step its definition computes it, which holds the whole score matrix.
    A budget that keeps every token is read as with ``per="run"``, and nothing is measured for it. `rows` has no
    meaning: all are held, in the order of the tokens. On Klein-KV they are the pipeline's own, and tiles rank in the
    step that stores them and in later profiling steps, which read everything.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> sra.SparseRef("mass", 0.25, execute="both").execute
    Cache(first='kept', rows='budget', layers=None, rerank_every=None, refresh=None, per='run', tile=4, \
rest='means', cell=4, isolated=None)
    >>> sra.SparseRef("grid", 1.0, execute=Cache(refresh=sra.Every(4, warmup=2))).describe()
    "Grid, Constant(keep=1.0, per='reference'), cache, refreshed Every(n=4, warmup=2, last=0)"
    >>> sra.SparseRef("mass", 0.125, execute=Cache(per="tile")).describe()
    "AttentionMass, Constant(keep=0.125, per='reference'), cache per tile 4x4 + means 4x4"
    """

    first: str = "all"
    rows: str = "budget"
    layers: tuple[float, ...] | None = None
    rerank_every: int | None = None
    refresh: Refresh | None = None
    per: str = "run"
    tile: int = 4
    rest: str | None = "means"
    cell: int = 4
    isolated: bool | Isolation | None = None

    def __post_init__(self) -> None:
        if self.refresh is not None and not isinstance(self.refresh, Refresh):
            raise ConfigError(f"refresh must be an Every, At, Never or Drift, got {self.refresh!r}")
        if not is_one_of(self.first, ("all", "kept")):
            raise ConfigError(f'first must be "all" or "kept", got {self.first!r}')
        if not is_one_of(self.rows, CACHE_ROWS):
            raise ConfigError(f'cache_rows must be "budget" or "all", got {self.rows!r}')
        if self.layers is not None:
            layers = numbers(self.layers)
            if not layers or not all(0 < factor <= 1 for factor in layers):
                raise ConfigError(LAYERS.format(self.layers, self.name))
            object.__setattr__(self, "layers", layers)
        check_every(self.rerank_every)
        self._check_tiles()
        self._check_isolated()
        if self.rerank_every is None:
            return
        if self.layers is not None:
            raise ConfigError(
                "rerank_every measures every stored key in every layer, of which layers holds a share, got "
                f"{self.rerank_every} and {self.layers}"
            )
        if self.first == "kept":
            raise ConfigError(
                'rerank_every needs the keys of every reference token, which execute="both" never computes; use "cache"'
            )

    def _check_tiles(self) -> None:
        if not is_one_of(self.per, PERS):
            raise ConfigError(f'per must be "run" or "tile", got {self.per!r}')
        for name in ("tile", "cell"):
            side = getattr(self, name)
            if isinstance(side, bool) or not isinstance(side, int) or side < 1:
                raise ConfigError(f"{name} must be the side of a square of tokens, an int of at least 1, got {side!r}")
        if self.rest is not None and not is_one_of(self.rest, RESTS[:-1]):
            raise ConfigError(f'rest must be "means", "weighted" or None, got {self.rest!r}')
        if self.per == "run":
            given = [name for name in ("tile", "rest", "cell") if getattr(self, name) != getattr(Cache, name)]
            if given:
                raise ConfigError(f'{" and ".join(given)} must come with per="tile", got per="run"')
            return
        for name, why in (
            ("layers", "each layer's tiles read as many tokens"),
            ("rerank_every", "tiles rank anew at every full step, and nothing is measured between"),
        ):
            if getattr(self, name) is not None:
                raise ConfigError(f'per="tile" goes without {name}: {why}, got {getattr(self, name)!r}')
        if self.first == "kept":
            raise ConfigError('per="tile" must compute every reference token in full steps, got first="kept"')

    def _check_isolated(self) -> None:
        if not isinstance(self.isolated, bool | Isolation | None):
            raise ConfigError(f"isolated must be a bool, an Isolation or None, got {self.isolated!r}")
        if not self.isolated:
            return
        if self.refresh is not None:
            raise ConfigError(
                f"isolated goes without refresh: references that run by themselves run once, got {self.refresh}"
            )
        for name, default, why in (
            ("first", "all", "every reference token runs"),
            ("per", "run", "no step has the rows of both, of which tiles measure their attention"),
        ):
            if getattr(self, name) != default:
                raise ConfigError(f'isolated goes with {name}="{default}": {why}, got {getattr(self, name)!r}')

    @property
    def name(self) -> str:
        return "cache" if self.first == "all" else "both"

    @property
    def reading(self) -> str:
        """How stored tokens are made and read, in words; nothing where one ranking serves the run."""
        if self.per == "run":
            return " of references by themselves" if self.isolated else ""
        means = {None: "", "means": " + means"}.get(self.rest, f" + {self.rest} means")
        means += "" if self.rest is None else f" {self.cell}x{self.cell}"
        return f" per tile {self.tile}x{self.tile}{means}"

    def more(self) -> dict[str, Any]:
        """Fields that most caches leave at their defaults, those that differ, as JSON types."""
        data: dict[str, Any] = {}
        if self.per == "tile":
            data = {"per": self.per, "tile": self.tile, "rest": self.rest or "none", "cell": self.cell}
        if self.isolated is not None:
            data["isolated"] = self.isolated if isinstance(self.isolated, bool) else self.isolated.to_dict()
        return data

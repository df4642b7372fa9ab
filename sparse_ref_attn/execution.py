"""Where the saving happens: rows dropped at the transformer's input or at a block, or stored reference K/V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .checks import is_int, is_one_of, numbers
from .errors import ConfigError
from .refresh import Refresh
from .vocabulary import chosen

__all__ = ["CACHE_ROWS", "EXECUTIONS", "PERS", "PROFILES", "RESTS", "Cache", "Execution", "Tokens", "execution"]

EXECUTIONS = ("tokens", "cache", "both")
PROFILES = ("step", "in_flight")
CACHE_ROWS = ("budget", "all")
PERS = ("run", "tile")
RESTS = ("means", "weighted", "none")
NAMES = {"profile": PROFILES, "cache_rows": CACHE_ROWS, "per": PERS, "rest": RESTS}


@dataclass(frozen=True)
class Tokens:
    """Dropped rows leave the sequence, so that blocks run on a shorter one.

    Parameters
    ----------
    from_block : int
        Block from which on the dropped tokens are gone: all tokens run through the blocks before it, at every step.
        0, the default, is the transformer's input. Below the number of blocks.
    in_flight : bool or int
        Measure attention in the first blocks of step 0, after which the dropped tokens leave that very step, instead of
        in whole dense steps; for models of few steps, where a dense step is a large part of the run. An int is the
        number of first blocks that all tokens run through and that are measured, at least 1 and below the number of
        blocks. True: as many as the block indices of the selector reach; where it gives none, a quarter of all,
        rounded up (15 of Kontext's 57, 8 of klein-9b's 32, 15 of Qwen-Image-Edit's 60). Blocks that a selector names
        ("single", "double", "all") are those among the first; where none is, all the first ones.
    rerank_every : int, optional
        Measure and rank again in a dense step every n steps after the last profiling step. Default never.

    Raises
    ------
    ConfigError
        For a value outside its range, and for `in_flight` with `rerank_every`.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> sra.SparseRef("mass", 0.25, execute=Tokens(in_flight=True)).describe()
    "AttentionMass, Constant(keep=0.25, per='reference'), tokens, profiled in flight"
    """

    from_block: int = 0
    in_flight: bool | int = False
    rerank_every: int | None = None

    def __post_init__(self) -> None:
        if not is_int(self.from_block, 0):
            raise ConfigError(f"from_block must be an int of at least 0, got {self.from_block!r}")
        if not isinstance(self.in_flight, bool) and not is_int(self.in_flight, 1):
            raise ConfigError(f"in_flight must be a bool or an int of at least 1, got {self.in_flight!r}")
        _check_every(self.rerank_every)
        if self.in_flight and self.rerank_every is not None:
            raise ConfigError(
                'profile="in_flight" goes with execute="tokens" and without rerank_every, got '
                f"'tokens' and {self.rerank_every}"
            )

    def check_probes(self, probes: Sequence[Any], selector: str) -> None:
        """Raise ConfigError where attention is measured in flight, and a selector's probes cannot be."""
        if self.in_flight and not probes:
            raise ConfigError(
                'profile="in_flight" needs a selector (or a guard) that measures attention, got '
                f"{selector}, which needs no profiling at all"
            )
        for probe in probes if self.in_flight else ():
            if tuple(probe.steps) != (0,):
                raise ConfigError(f'profile="in_flight" measures in step 0 alone, got steps {tuple(probe.steps)}')

    @property
    def name(self) -> str:
        return "tokens"


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
rest='means', cell=4)
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
                raise ConfigError(_LAYERS.format(self.layers, self.name))
            object.__setattr__(self, "layers", layers)
        _check_every(self.rerank_every)
        self._check_tiles()
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

    @property
    def name(self) -> str:
        return "cache" if self.first == "all" else "both"

    @property
    def reading(self) -> str:
        """How stored tokens are read, in words; nothing where one ranking serves the run."""
        if self.per == "run":
            return ""
        means = {None: "", "means": " + means"}.get(self.rest, f" + {self.rest} means")
        means += "" if self.rest is None else f" {self.cell}x{self.cell}"
        return f" per tile {self.tile}x{self.tile}{means}"


Execution = Tokens | Cache

_LAYERS = 'layers must be factors in (0, 1], one an attention layer, with execute="cache" or "both", got {!r} with {!r}'


def execution(way: object, settings: Mapping[str, Any]) -> Execution:
    """The execution that ``SparseRef(execute=way, **settings)`` means.

    Parameters
    ----------
    way : Tokens, Cache, or {"tokens", "cache", "both"}
    settings : mapping
        from_block, profile, profile_blocks, cache_rows, layers, rerank_every, refresh, per, tile, rest, cell, as far
        as they are given (not None); rest is "none" for no means.

    Examples
    --------
    >>> execution("both", {"layers": (1.0, 0.5)}).first
    'kept'
    """
    if not isinstance(way, (Tokens, Cache)):
        if not is_one_of(way, EXECUTIONS):
            raise ConfigError(
                f"execute must be one of {', '.join(EXECUTIONS)}, got {way!r}, which is no Tokens or Cache either"
            )
        way = Tokens() if way == "tokens" else Cache("all" if way == "cache" else "kept")
    given = {name: value for name, value in settings.items() if value is not None}
    for name, choices in NAMES.items():
        if isinstance(given.get(name), str):
            given[name] = chosen(name, given[name], choices)
    profile, blocks = given.pop("profile", None), given.pop("profile_blocks", None)
    if profile is not None and not is_one_of(profile, PROFILES):
        raise ConfigError(f'profile must be "step" or "in_flight", got {profile!r}')
    if isinstance(way, Cache):
        from_block = given.pop("from_block", 0)
        if from_block != 0:
            raise ConfigError(
                f'from_block goes with execute="tokens" only, got {way.name!r} and from_block={from_block}'
            )
        if profile == "in_flight":
            raise ConfigError(
                'profile="in_flight" goes with execute="tokens" and without rerank_every, got '
                f"{way.name!r} and {given.get('rerank_every')}"
            )
        given |= {"rows": given.pop("cache_rows")} if "cache_rows" in given else {}
        if is_one_of(given.get("rest"), RESTS[-1:]):
            given["rest"] = None
    else:
        if "layers" in given:
            raise ConfigError(_LAYERS.format(given["layers"], way.name))
        if "refresh" in given:
            raise ConfigError(f'refresh goes with execute="cache" or "both" only, got it with {way.name!r}')
        of_tiles = [name for name in ("per", "tile", "rest", "cell") if given.pop(name, "run") != "run"]
        if of_tiles:
            raise ConfigError(f'{" and ".join(of_tiles)} must come with execute="cache", got it with {way.name!r}')
        if given.pop("cache_rows", "budget") != "budget":
            raise ConfigError('cache_rows goes with execute="cache" or "both" only, got it with \'tokens\'')
        if profile is not None:
            way = replace(way, in_flight=profile == "in_flight")
    if blocks is not None:
        if not is_int(blocks, 1):
            raise ConfigError(f"profile_blocks must be an int of at least 1, got {blocks!r}")
        if isinstance(way, Cache) or not way.in_flight:
            raise ConfigError(f'profile_blocks counts blocks with profile="in_flight" only, got {blocks}')
        way = replace(way, in_flight=blocks)
    return replace(way, **given)


def _check_every(every: object) -> None:
    if every is not None and not is_int(every, 1):
        raise ConfigError(f"rerank_every must be an int of at least 1, got {every!r}")

"""What to keep, how much, and where the saving happens: one frozen dataclass."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import refresh as refreshing
from . import schedules
from .checks import is_int, numbers
from .errors import ConfigError
from .execution import EXECUTIONS, Cache, Execution, Tokens, execution
from .guard import UniformGuard
from .isolation import Isolation
from .refresh import Refresh
from .schedules import Budget
from .selection import AttentionMass, Probe, Reducer, Selector, names, selector
from .vocabulary import chosen

__all__ = ["SparseRef", "UniformGuard"]

CLOCKS = ("steps", "sigma")


@dataclass(frozen=True, init=False)
class SparseRef:
    """Selector x budget x execution, with the choices that go with them.

    Parameters
    ----------
    select : Selector, Reducer or str
        Which tokens matter (`selection`), or a rival that changes tokens (`rivals`). A string
        names a selector with its defaults: "mass", "edges", "saliency", "grid", "random", ...
    budget : Budget, float or int
        How many, at each step (`schedules`). A float in (0, 1] is a ratio, an int a number of
        tokens, of each reference.
    execute : Tokens, Cache, or {"tokens", "cache", "both"}
        Where the saving happens (`execution`). "tokens", ``Tokens()``, drops rows at the transformer's
        input, so that every block runs on a shorter sequence. "cache", ``Cache()``, runs the references now
        and then and stores their keys and values, of which the steps between read the ranked ones that the
        budget keeps (all of them with a budget of 1.0); "both", ``Cache(first="kept")``, drops rows from
        the steps that compute them, too. On a model that keeps its references' keys and values itself
        (FLUX.2 Klein-KV) "tokens" does what "both" does; of GLM-Image and Qwen-Image-2.1 all always run.
    from_block, profile, profile_blocks, cache_rows, layers, rerank_every, refresh, per, tile, rest, cell, isolated
        Fields of the execution, said beside it: ``execute="cache", cache_rows="all"`` is
        ``Cache(rows="all")``, and ``profile="in_flight", profile_blocks=n`` is ``Tokens(in_flight=n)``;
        ``rest="none"`` is ``Cache(rest=None)``.
    floor : float or int
        Least kept of each reference: a ratio of it, or tokens. Matters where references compete
        (a budget with ``per="all"``). Default 0.
    weights : tuple of float, optional
        Importance of each reference where references compete; > 0. Default all alike.
    multiple : int
        Round the *joint* length (text + generation + kept) up to a multiple of this. Default 1.
    guard : UniformGuard, optional
        Keeps more where the mass is near uniform; profiles if the selector does not. Default off.
    clock : {"steps", "sigma"}
        What progress means to a budget: "steps" is i / (n - 1); "sigma" is 1 - sigma_i / sigma_0
        of the pipeline's scheduler, the literal 1 - t/T of ReCAST eq. (4).
    seed : int
        Of the library's own generator, reseeded every run.

    Raises
    ------
    ConfigError
        For a value outside its range.

    Examples
    --------
    >>> SparseRef(select="edges", budget=0.25).budget
    Constant(keep=0.25, per='reference')
    >>> config = SparseRef("mass", schedules.Linear(0.1, 0.5))
    >>> SparseRef.from_json(config.to_json()) == config
    True
    """

    select: Selector | Reducer
    budget: Budget
    execute: Execution
    floor: float | int
    weights: tuple[float, ...] | None
    multiple: int
    guard: UniformGuard | None
    clock: str
    seed: int

    def __init__(
        self,
        select: Selector | Reducer | str = "mass",
        budget: Budget | float | int = 0.25,
        execute: Execution | str = "tokens",
        from_block: int | None = None,
        profile: str | None = None,
        profile_blocks: int | None = None,
        floor: float | int = 0,
        weights: Sequence[float] | None = None,
        multiple: int = 1,
        guard: UniformGuard | None = None,
        clock: str = "steps",
        seed: int = 0,
        cache_rows: str | None = None,
        layers: Sequence[float] | None = None,
        rerank_every: int | None = None,
        refresh: Refresh | None = None,
        per: str | None = None,
        tile: int | None = None,
        rest: str | None = None,
        cell: int | None = None,
        isolated: bool | Isolation | None = None,
    ) -> None:
        if isinstance(execute, str):
            execute = chosen("execute", execute, EXECUTIONS)
        clock = chosen("clock", clock, CLOCKS)
        given: dict[str, Any] = {"from_block": from_block, "profile": profile, "profile_blocks": profile_blocks}
        given |= {"cache_rows": cache_rows, "layers": layers, "rerank_every": rerank_every}
        given |= {"refresh": refresh, "per": per, "tile": tile, "rest": rest, "cell": cell, "isolated": isolated}
        fields: dict[str, Any] = {
            "select": select if isinstance(select, Reducer) else selector(select),
            "budget": schedules.budget(budget),
            "execute": execution(execute, given),
        }
        fields |= {
            "floor": floor,
            "weights": weights,
            "multiple": multiple,
            "guard": guard,
            "clock": clock,
            "seed": seed,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check()
        self._check_selector()

    def _check(self) -> None:
        if self.weights is not None:
            weights = numbers(self.weights)
            if not weights or any(not (w > 0 and math.isfinite(w)) for w in weights):
                raise ConfigError(f"weights must be finite numbers above 0, one a reference, got {self.weights!r}")
            object.__setattr__(self, "weights", weights)
        schedules.check_floor("floor", self.floor)
        if not is_int(self.multiple, 1):
            raise ConfigError(f"multiple must be an int of at least 1, got {self.multiple!r}")
        if not is_int(self.seed):
            raise ConfigError(f"seed must be an int, got {self.seed!r}")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed must fit torch's generators, in [-2**63, 2**64), got {self.seed}")
        if not isinstance(self.guard, UniformGuard | None):
            raise ConfigError(f"guard must be a UniformGuard or None, got {self.guard!r}")

    def _check_selector(self) -> None:
        """What the execution needs of the selector."""
        select, way, probes = self.select, self.execute, self.probes()
        if isinstance(select, Reducer):
            if self.guard is not None:
                raise ConfigError("a rival that changes tokens has no ranking to guard: guard must be None")
            if not isinstance(way, Tokens):
                raise ConfigError(f'a rival that changes tokens runs with execute="tokens" only, got {way.name!r}')
            if way.from_block:
                raise ConfigError(
                    f"a rival changes tokens at the transformer's input: from_block must be 0, got {way.from_block}"
                )
        asked = () if isinstance(select, Reducer) else select.probes()
        if way.rerank_every is not None and not asked:
            raise ConfigError(
                f"rerank_every needs a selector that measures attention, got {type(select).__name__}, whose "
                "ranking would not change"
            )
        if isinstance(way, Tokens):
            way.check_probes(() if isinstance(select, Reducer) else probes, type(select).__name__)
        elif way.per == "tile":
            if not isinstance(select, AttentionMass) or select.query_stride > 1 or select.value_norm:
                raise ConfigError(
                    'per="tile" ranks for each tile by its own attention mass: select must be AttentionMass ("mass") '
                    f"without query_stride and value_norm, got {select}"
                )
        elif way.rerank_every is not None and any(probe.queries != "generation" for probe in probes):
            raise ConfigError(
                'rerank_every with execute="cache" has no queries of the reference tokens to measure, got '
                f"{type(select).__name__}; use AttentionMass"
            )

    @property
    def from_block(self) -> int:
        """As in `Tokens`; 0 with a cache."""
        return self.execute.from_block if isinstance(self.execute, Tokens) else 0

    @property
    def profile(self) -> str:
        """Where attention is measured: in whole steps, "step", or "in_flight"."""
        return "in_flight" if isinstance(self.execute, Tokens) and self.execute.in_flight else "step"

    @property
    def profile_blocks(self) -> int | None:
        """First blocks that an in-flight profile is told to measure, if it is told."""
        told = self.execute.in_flight if isinstance(self.execute, Tokens) else False
        return None if isinstance(told, bool) else told

    @property
    def cache_rows(self) -> str:
        """As in `Cache.rows`; "budget" without a cache."""
        return self.execute.rows if isinstance(self.execute, Cache) else "budget"

    @property
    def layers(self) -> tuple[float, ...] | None:
        """As in `Cache`; None without a cache."""
        return self.execute.layers if isinstance(self.execute, Cache) else None

    @property
    def rerank_every(self) -> int | None:
        """As in `Tokens` and `Cache`."""
        return self.execute.rerank_every

    @property
    def refresh(self) -> Refresh | None:
        """As in `Cache`; None without a cache."""
        return self.execute.refresh if isinstance(self.execute, Cache) else None

    @property
    def per(self) -> str:
        """As in `Cache`; "run" without a cache."""
        return self.execute.per if isinstance(self.execute, Cache) else "run"

    def probes(self) -> tuple[Probe, ...]:
        """Attention that must be measured: what the selector asks for, and what guard and budget need besides."""
        found = list(self.select.probes()) if isinstance(self.select, Selector) else []
        if (self.guard is not None or self.budget.needs_mass) and not any(p.queries == "generation" for p in found):
            found.extend(AttentionMass().probes())
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; raises ConfigError for a selector that holds a function or an array."""
        if isinstance(self.select, Reducer):
            raise ConfigError(f"a rival does not travel to JSON, got {type(self.select).__name__}")
        data = {
            "select": names.to_dict(self.select),
            "budget": self.budget.to_dict(),
            "execute": self.execute.name,
            "from_block": self.from_block,
            "profile": self.profile,
            "profile_blocks": self.profile_blocks,
            "floor": self.floor,
            "weights": None if self.weights is None else list(self.weights),
            "multiple": self.multiple,
            "guard": None if self.guard is None else vars(self.guard).copy(),
            "clock": self.clock,
            "seed": self.seed,
            "cache_rows": self.cache_rows,
            "layers": None if self.layers is None else list(self.layers),
            "rerank_every": self.rerank_every,
            "refresh": None if self.refresh is None else self.refresh.to_dict(),
        }
        return data | (self.execute.more() if isinstance(self.execute, Cache) else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparseRef:
        """The inverse of `to_dict`."""
        try:
            data = dict(data)
            data["select"] = names.from_dict(data["select"])
            data["budget"] = schedules.from_dict(data["budget"])
            if data.get("guard") is not None:
                data["guard"] = UniformGuard(**data["guard"])
            if data.get("weights") is not None:
                data["weights"] = tuple(data["weights"])
            if data.get("refresh") is not None:
                data["refresh"] = refreshing.from_dict(data["refresh"])
            if data.get("execute") == "tokens":  # older files say what a cache would hold beside it
                data.pop("cache_rows", None)
            return cls(**data)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"a configuration must hold the fields of SparseRef, got {data}") from error

    def to_json(self) -> str:
        """As `to_dict`, a JSON string."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> SparseRef:
        """The inverse of `to_json`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a configuration must be JSON, got {text[:80]!r}") from error
        return cls.from_dict(data)

    def describe(self) -> str:
        """One line for logs and tables."""
        name = type(self.select).__name__
        depth = f" from block {self.from_block}" if self.from_block else ""
        profile = ", profiled in flight" if self.profile == "in_flight" else ""
        again = "" if self.refresh is None else f", refreshed {self.refresh}"
        tiles = self.execute.reading if isinstance(self.execute, Cache) else ""
        return f"{name}, {self.budget}, {self.execute.name}{tiles}{depth}{profile}{again}"

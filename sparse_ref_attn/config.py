"""What to keep, how much, and where the saving happens: one frozen dataclass."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import schedules
from .checks import is_number, is_one_of, numbers
from .errors import ConfigError
from .schedules import Budget
from .selection import AttentionMass, Probe, Reducer, Selector, selector
from .selection.names import from_dict as selector_from_dict
from .selection.names import to_dict as selector_to_dict

__all__ = ["SparseRef", "UniformGuard"]

EXECUTIONS = ("tokens", "cache", "both")
PROFILES = ("step", "in_flight")
CACHE_ROWS = ("budget", "all")


@dataclass(frozen=True)
class UniformGuard:
    """Keeps more where the profiled attention is spread evenly: such edits need every token.

    A global recolour looks at the whole reference, and its mass is near uniform; a subject is
    looked at in one place. When the top quarter of the tokens holds less than `top_quarter` of
    the mass, every budget is raised to the tokens that hold `mass` of it, and to all tokens when
    that is more than `dense_above` of them.

    Parameters
    ----------
    top_quarter : float, in [0.25, 1]
        Share of the mass in the top 25 % tokens below which the mass counts as near uniform.
        0.25 is exactly uniform; the default lies between what a first small model showed for
        global recolours (0.29) and for placed subjects (0.62). It depends on the blocks that the
        selector measures: see Notes.
    mass : float, in (0, 1]
        Share of the mass to keep then.
    dense_above : float, in (0, 1]
        Share of the tokens above which dropping is given up.

    Notes
    -----
    In a dense-trained model of ``sparse_ref_attn.toy`` (14 held-out subjects a task, first step) the share over all
    blocks was 0.29-0.32 for global recolours and 0.37-0.49 for placed subjects. Over the single-stream blocks, which
    ReCAST measures, the two overlapped, 0.40-0.50 and 0.48-0.59, and the default hardly fired;
    ``ReCAST(select=AttentionMass(blocks="all"), guard=UniformGuard(0.345))`` did. Try it on your own model.
    """

    top_quarter: float = 0.40
    mass: float = 0.9
    dense_above: float = 0.75

    def __post_init__(self) -> None:
        for name, low in (("top_quarter", 0.25), ("mass", 0.0), ("dense_above", 0.0)):
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= 1 or value == 0:
                raise ConfigError(f"guard {name} must lie in [{low}, 1] and not be 0, got {value!r}")


@dataclass(frozen=True)
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
    execute : {"tokens", "cache", "both"}
        Where the saving happens. "tokens" drops rows at the transformer's input, so that every
        block runs on a shorter sequence. "cache" and "both" need a model that computes its
        references' keys and values once (FLUX.2 Klein-KV): "cache" computes those of every
        reference token, and each later step attends to the ranked ones that its budget keeps;
        "both" drops rows from the step that computes them, too. On such a model "tokens" does
        what "both" does.
    from_block : int
        Block from which on the dropped tokens are gone: all tokens run through the blocks before it, at every step.
        0, the default, is the transformer's input. Below the number of blocks.
    profile : {"step", "in_flight"}
        Where attention is measured, if it is. "step": in whole dense steps, those that the selector
        names. "in_flight": in the first blocks of step 0, after which the dropped tokens leave that
        very step; for models of few steps, where a dense step is a large part of the run.
    profile_blocks : int, optional
        With "in_flight", the number of first blocks that all tokens run through and that are
        measured, at least 1 and below the number of blocks. Default: as many as the block indices
        of the selector reach; where it gives none, a quarter of all, rounded up (15 of Kontext's
        57, 8 of klein-9b's 32, 15 of Qwen-Image-Edit's 60). Blocks that a selector names ("single",
        "double", "all") are those among the first; where none is, all the first ones.
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
    cache_rows : {"budget", "all"}
        Which reference keys and values are held between steps, where the model keeps any: those of
        the largest budget still to come, or all.
    layers : tuple of float, optional
        Factors in (0, 1] on the budget, one for each attention layer in order of execution: a layer
        reads that share of the step's kept keys and values, its best ones, rounded up. Only with
        "cache" and "both", and without `rerank_every`.
    rerank_every : int, optional
        Measure and rank again every n steps after the last profiling step. With "tokens" such a step
        is dense; with "cache" it reads all stored keys of the references, at the cost of the scoring
        alone (see ``query_stride`` of the selector), and all rows are held. Default never.

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

    select: Selector | Reducer | str = "mass"
    budget: Budget | float | int = 0.25
    execute: str = "tokens"
    from_block: int = 0
    profile: str = "step"
    profile_blocks: int | None = None
    floor: float | int = 0
    weights: tuple[float, ...] | None = None
    multiple: int = 1
    guard: UniformGuard | None = None
    clock: str = "steps"
    seed: int = 0
    cache_rows: str = "budget"
    layers: tuple[float, ...] | None = None
    rerank_every: int | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if not isinstance(self.select, Reducer):
            set_(self, "select", selector(self.select))
        set_(self, "budget", schedules.budget(self.budget))
        if self.weights is not None:
            weights = numbers(self.weights)
            if not weights or any(not (w > 0 and math.isfinite(w)) for w in weights):
                raise ConfigError(f"weights must be finite numbers above 0, one a reference, got {self.weights!r}")
            set_(self, "weights", weights)
        if not is_one_of(self.execute, EXECUTIONS):
            raise ConfigError(f"execute must be one of {', '.join(EXECUTIONS)}, got {self.execute!r}")
        if isinstance(self.from_block, bool) or not isinstance(self.from_block, int) or self.from_block < 0:
            raise ConfigError(f"from_block must be an int of at least 0, got {self.from_block!r}")
        schedules.check_floor("floor", self.floor)
        if isinstance(self.multiple, bool) or not isinstance(self.multiple, int) or self.multiple < 1:
            raise ConfigError(f"multiple must be an int of at least 1, got {self.multiple!r}")
        if not is_one_of(self.clock, ("steps", "sigma")):
            raise ConfigError(f'clock must be "steps" or "sigma", got {self.clock!r}')
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be an int, got {self.seed!r}")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed must fit torch's generators, in [-2**63, 2**64), got {self.seed}")
        if self.guard is not None and not isinstance(self.guard, UniformGuard):
            raise ConfigError(f"guard must be a UniformGuard or None, got {self.guard!r}")
        if isinstance(self.select, Reducer) and self.guard is not None:
            raise ConfigError("a rival that changes tokens has no ranking to guard: guard must be None")
        if isinstance(self.select, Reducer) and self.from_block:
            raise ConfigError(
                f"a rival changes tokens at the transformer's input: from_block must be 0, got {self.from_block}"
            )
        self._check_cache()
        self._check_in_flight()

    def _check_cache(self) -> None:
        cached = self.execute in ("cache", "both")
        if cached and self.from_block:
            raise ConfigError(
                f'from_block goes with execute="tokens" only, got {self.execute!r} and from_block={self.from_block}'
            )
        if cached and isinstance(self.select, Reducer):
            raise ConfigError(f'a rival that changes tokens runs with execute="tokens" only, got {self.execute!r}')
        if not is_one_of(self.cache_rows, CACHE_ROWS):
            raise ConfigError(f'cache_rows must be "budget" or "all", got {self.cache_rows!r}')
        if self.layers is not None:
            layers = numbers(self.layers)
            if not cached or not layers or not all(0 < factor <= 1 for factor in layers):
                raise ConfigError(
                    'layers must be factors in (0, 1], one an attention layer, with execute="cache" or "both", '
                    f"got {self.layers!r} with {self.execute!r}"
                )
            object.__setattr__(self, "layers", layers)
        if self.rerank_every is None:
            return
        if isinstance(self.rerank_every, bool) or not isinstance(self.rerank_every, int) or self.rerank_every < 1:
            raise ConfigError(f"rerank_every must be an int of at least 1, got {self.rerank_every!r}")
        probes = () if isinstance(self.select, Reducer) else self.select.probes()  # type: ignore[union-attr]
        if not probes:
            raise ConfigError(
                f"rerank_every needs a selector that measures attention, got {type(self.select).__name__}, whose "
                "ranking would not change"
            )
        if self.layers is not None:
            raise ConfigError(
                "rerank_every measures every stored key in every layer, of which layers holds a share, got "
                f"{self.rerank_every} and {self.layers}"
            )
        if self.execute == "both":
            raise ConfigError(
                'rerank_every needs the keys of every reference token, which execute="both" never computes; use "cache"'
            )
        if cached and any(probe.queries != "generation" for probe in probes):
            raise ConfigError(
                'rerank_every with execute="cache" has no queries of the reference tokens to measure, got '
                f"{type(self.select).__name__}; use AttentionMass"
            )

    def _check_in_flight(self) -> None:
        first = self.profile_blocks
        if not is_one_of(self.profile, PROFILES):
            raise ConfigError(f'profile must be "step" or "in_flight", got {self.profile!r}')
        if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 1):
            raise ConfigError(f"profile_blocks must be an int of at least 1, got {first!r}")
        if self.profile == "step":
            if first is not None:
                raise ConfigError(f'profile_blocks counts blocks with profile="in_flight" only, got {first}')
            return
        probes = self.probes()
        if isinstance(self.select, Reducer) or not probes:
            raise ConfigError(
                'profile="in_flight" needs a selector (or a guard) that measures attention, got '
                f"{type(self.select).__name__}, which needs no profiling at all"
            )
        for probe in probes:
            if tuple(probe.steps) != (0,):
                raise ConfigError(f'profile="in_flight" measures in step 0 alone, got steps {tuple(probe.steps)}')
        if self.execute != "tokens" or self.rerank_every is not None:
            raise ConfigError(
                'profile="in_flight" goes with execute="tokens" and without rerank_every, got '
                f"{self.execute!r} and {self.rerank_every}"
            )

    def probes(self) -> tuple[Probe, ...]:
        """Attention that must be measured: what the selector asks for, and what guard and budget need besides."""
        found = list(self.select.probes()) if isinstance(self.select, Selector) else []
        needs_mass = self.guard is not None or (isinstance(self.budget, Budget) and self.budget.needs_mass)
        if needs_mass and not any(p.queries == "generation" for p in found):
            found.extend(AttentionMass().probes())
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; raises ConfigError for a selector that holds a function or an array."""
        if isinstance(self.select, Reducer):
            raise ConfigError(f"a rival does not travel to JSON, got {type(self.select).__name__}")
        assert isinstance(self.select, Selector)
        assert isinstance(self.budget, Budget)
        return {
            "select": selector_to_dict(self.select),
            "budget": self.budget.to_dict(),
            "execute": self.execute,
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
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparseRef:
        """The inverse of `to_dict`."""
        try:
            data = dict(data)
            data["select"] = selector_from_dict(data["select"])
            data["budget"] = schedules.from_dict(data["budget"])
            if data.get("guard") is not None:
                data["guard"] = UniformGuard(**data["guard"])
            if data.get("weights") is not None:
                data["weights"] = tuple(data["weights"])
            if data.get("layers") is not None:
                data["layers"] = tuple(data["layers"])
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
        return f"{name}, {self.budget}, {self.execute}{depth}{profile}"

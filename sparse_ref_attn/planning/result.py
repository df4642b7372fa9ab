"""What a plan says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config import SparseRef
from ..errors import ConfigError
from ..estimation import Estimate
from ..frontier import Loss
from ..report.page import page, table
from ..source import source

__all__ = ["FewerSteps", "Option", "RunPlan"]


@dataclass(frozen=True)
class Option:
    """A candidate in the caller's own number of steps.

    Parameters
    ----------
    key : str
        Of `candidates.CANDIDATES`.
    config : SparseRef
    estimate : Estimate
    loss : Loss
        On the small model.
    """

    key: str
    config: SparseRef
    estimate: Estimate
    loss: Loss

    @property
    def bound(self) -> tuple[float, float]:
        """Between which the bound of the transformer's speed-up lies, as attention takes none or all of its time."""
        dense, own = self.estimate.dense, self.estimate.sparse
        low, high = sorted((dense.attention / own.attention, dense.matmul / own.matmul))
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """JSON types; the configuration as Python code."""
        return {
            "key": self.key, "code": source(self.config), "flop_ratio": self.estimate.flop_ratio,
            "bound": list(self.bound), "peak_bytes": self.estimate.memory.sparse.total, "loss": asdict(self.loss),
            "estimate": self.estimate.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class FewerSteps:
    """A run in fewer steps that is as fast as was asked for.

    Parameters
    ----------
    steps : int
    flop_ratio : float
        Of the dense run in all steps over this one.
    loss : Loss or None
        On the small model, of the measured run whose share of the steps is nearest; None without one.
    key : str, optional
        The candidate that is patched in besides; None: every token runs.
    """

    steps: int
    flop_ratio: float
    loss: Loss | None
    key: str | None = None


@dataclass(frozen=True)
class RunPlan:
    """The setting for a speed, made by `plan`.

    Parameters
    ----------
    model : str
    speedup : float
        What was asked for, as dense work over the run's own.
    steps : int
        Of the run.
    best : Option or None
        Of the candidates that are as fast as that, the one that loses least; None where none is.
    fastest : Option or None
        Of all candidates that the model can run.
    fewer_steps : FewerSteps or None
        The dense run in as many steps as are fast enough; None where one step is not.
    together : FewerSteps or None
        Where no candidate alone is fast enough: the one that is in the most steps.
    notes : tuple of str
    """

    model: str
    speedup: float
    steps: int
    best: Option | None
    fastest: Option | None
    fewer_steps: FewerSteps | None
    together: FewerSteps | None = None
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> SparseRef:
        """What to patch with.

        Raises
        ------
        ConfigError
            Where the speed cannot be had: it says what comes nearest, and what fewer steps would give.
        """
        if self.best is None:
            raise ConfigError(self._refusal)
        return self.best.config

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        fewer, together = (None if each is None else asdict(each) for each in (self.fewer_steps, self.together))
        best, fastest = (None if each is None else each.to_dict() for each in (self.best, self.fastest))
        return {
            "model": self.model, "speedup": self.speedup, "steps": self.steps, "best": best, "fastest": fastest,
            "fewer_steps": fewer, "together": together, "notes": list(self.notes),
        }  # fmt: skip

    def summary(self) -> str:
        """The plan as text, a few lines."""
        facts = self._facts()
        indent = max(len(name) for name, _ in facts) + 2
        return "\n".join([self._title, *(f"{name:<{indent}}{value}" for name, value in facts)])

    def _repr_html_(self) -> str:
        facts = [(name, value) for name, value in self._facts() if name != "note"]
        return page(self._title, table((), facts, left=(0, 1)), notes=self.notes)

    @property
    def _title(self) -> str:
        return f"{self.model}: {self.speedup:g}x less work in {self.steps} steps"

    @property
    def _refusal(self) -> str:
        can = "no candidate can run here"
        if self.fastest is not None:
            can = f"the fastest candidate, {self.fastest.key}, saves {self.fastest.estimate.flop_ratio:.2f}x"
        parts = [f"the speed-up must be one that sparing references allows, got {self.speedup:g}x where {can}"]
        if self.fewer_steps is not None:
            parts.append(f"{self.fewer_steps.steps} of {self.steps} steps with every token save that much")
        if self.together is not None:
            parts.append(f"{self.together.steps} steps with {self.together.key} do so too")
        return "; ".join(parts)

    def _facts(self) -> list[tuple[str, str]]:
        best, facts = self.best, []
        if best is None:
            facts.append(("best", f"none: {self._refusal}"))
        else:
            low, high = (f"{bound:.2f}x" for bound in best.bound)
            bound = f"is {low}" if low == high else f"lies between {low} and {high}"
            facts += [
                ("best", f"{best.key}: sra.patch(pipe, {source(best.config)})"),
                ("work", f"FLOP ratio {best.estimate.flop_ratio:.2f}; the bound of its speed-up {bound}"),
                ("loss", f"{_of(best.loss)}: {best.loss.words}"),
                ("memory", f"peak {best.estimate.memory.sparse.total / 1e9:.1f} GB of the transformer, "
                           f"{best.estimate.memory.dense.total / 1e9:.1f} dense"),
            ]  # fmt: skip
        if self.fewer_steps is not None:
            facts.append(("fewer steps", _fewer(self.fewer_steps, self.steps)))
        if self.together is not None:
            facts.append(("together", _fewer(self.together, self.steps)))
        return [*facts, *(("note", note) for note in self.notes)]


def _fewer(fewer: FewerSteps, steps: int) -> str:
    what = "every token" if fewer.key is None else fewer.key
    measured = "" if fewer.loss is None else f"; {_of(fewer.loss)}: {fewer.loss.words}"
    return f"{fewer.steps} of {steps} steps, {what}: {fewer.flop_ratio:.2f}x{measured}"


def _of(loss: Loss) -> str:
    steps = f"{loss.steps} steps" if loss.steps == loss.base_steps else f"{loss.steps} of {loss.base_steps} steps"
    return f"small model, {steps}, worst kind of edit"

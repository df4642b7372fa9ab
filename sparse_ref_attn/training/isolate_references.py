"""References that run by themselves in training, so that their keys and values can be kept for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..isolation import Isolation
from .random_drop import RandomDrop

__all__ = ["IsolateReferences", "said_of"]


@dataclass(frozen=True)
class IsolateReferences:
    """References that see neither prompt nor noise nor time, for fine-tuning.

    In each call the model runs twice with the same weights: on the references by themselves, which gives their keys and
    values in every layer, and on text and generation, whose attention reads these beside its own. A model trained so
    has references that are computed once, and kept for any prompt and seed, without loss
    (``Cache(isolated=True)``).

    Parameters
    ----------
    per : {"all", "reference"}
        Who sees whom, as in `Isolation`: all references one another, or each itself alone.
    timestep : float, in [0, 1]
        Time of the references.
    drop : RandomDrop, optional
        What is read is a random share of the references' keys and values, drawn as without isolation; every reference
        token runs. Default all are read. Not with ``per_sample=True``.

    Raises
    ------
    ConfigError
        For a value outside its range.

    Notes
    -----
    What a family's layers are given in place of a text: none where they allow it (FLUX.1 Kontext, FLUX.2, LongCat), one
    row of zeros in Qwen-Image-Edit; a pooled prompt is zero and guidance 1. A `PlainAdapter` says it (``alone``).

    Examples
    --------
    >>> IsolateReferences(drop=RandomDrop((0.25, 1.0))).isolation
    Isolation(per='all', timestep=0.0)
    >>> IsolateReferences.from_dict(IsolateReferences("reference").to_dict())
    IsolateReferences(per='reference', timestep=0.0, drop=None)
    """

    per: str = "all"
    timestep: float = 0.0
    drop: RandomDrop | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "timestep", Isolation(self.per, self.timestep).timestep)
        if self.drop is not None and not isinstance(self.drop, RandomDrop):
            raise ConfigError(f"drop must be a RandomDrop or None, got {self.drop!r}")
        if self.drop is not None and self.drop.per_sample:
            raise ConfigError(
                "references that run by themselves are read by a batch whose items draw together: drop must have "
                f"per_sample=False, got {self.drop}"
            )

    @property
    def isolation(self) -> Isolation:
        """How the references run."""
        return Isolation(self.per, self.timestep)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {**self.isolation.to_dict(), "drop": None if self.drop is None else self.drop.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> IsolateReferences:
        """What `to_dict` wrote.

        Raises
        ------
        ConfigError
            For an unknown name or a value outside its range.
        """
        own = {name: value for name, value in data.items() if name != "drop"}
        drop = data.get("drop")
        return cls(**Isolation.from_dict(own).to_dict(), drop=None if drop is None else RandomDrop.from_dict(drop))


def said_of(drop: RandomDrop | IsolateReferences | None) -> dict[str, Any]:
    """What weights say of their training: a `RandomDrop` and an `Isolation`, each as a dict or None.

    Examples
    --------
    >>> said_of(IsolateReferences())
    {'random_drop': None, 'isolate': {'per': 'all', 'timestep': 0.0}}
    """
    isolate = drop if isinstance(drop, IsolateReferences) else None
    drawn = isolate.drop if isolate is not None else drop
    return {
        "random_drop": drawn.to_dict() if isinstance(drawn, RandomDrop) else None,
        "isolate": None if isolate is None else isolate.isolation.to_dict(),
    }

"""References that run through a model by themselves: how, for training and inference alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .checks import is_number, is_one_of
from .errors import ConfigError

__all__ = ["PERS", "Isolation"]

PERS = ("all", "reference")


@dataclass(frozen=True)
class Isolation:
    """How references run by themselves, so that their keys and values depend on nothing but them.

    Parameters
    ----------
    per : {"all", "reference"}
        All references see one another, or each sees itself alone: then a reference's keys and values do not depend on
        the others, and it takes a call of the model for each.
    timestep : float, in [0, 1]
        Time of the references, as the model is given it; 0 is a picture without noise.

    Raises
    ------
    ConfigError
        For a value outside its range.

    Examples
    --------
    >>> Isolation("reference").passes((4, 2))
    [range(0, 4), range(4, 6)]
    >>> Isolation.from_dict(Isolation(timestep=0.1).to_dict())
    Isolation(per='all', timestep=0.1)
    """

    per: str = "all"
    timestep: float = 0.0

    def __post_init__(self) -> None:
        if not is_one_of(self.per, PERS):
            raise ConfigError(f'per must be "all" or "reference", got {self.per!r}')
        if not is_number(self.timestep) or not 0 <= self.timestep <= 1:
            raise ConfigError(f"timestep must lie in [0, 1], got {self.timestep!r}")
        object.__setattr__(self, "timestep", float(self.timestep))

    def passes(self, sizes: Sequence[int]) -> list[range]:
        """Reference tokens of each call of the model, counted through all references of these `sizes`."""
        if self.per == "all":
            return [range(sum(sizes))]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Isolation:
        """What `to_dict` wrote.

        Raises
        ------
        ConfigError
            For an unknown name or a value outside its range.
        """
        if not isinstance(data, Mapping) or not {*data} <= {"per", "timestep"}:
            raise ConfigError(f"an isolation must have per and timestep alone, got {data!r}")
        return cls(**data)

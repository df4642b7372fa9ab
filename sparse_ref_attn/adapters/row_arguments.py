"""Arguments of a forward that hold one entry a row: what they look like, and cutting them to the kept rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..functional import pack_rows
from ..types import TokenLayout

__all__ = ["RowArgument", "by_token", "take_rows", "unpadded"]

TEXT = "text"

BY_TOKEN = ("timestep", "r_timestep", "timestep_sign", "guidance", "modulate_index", "force_keep_mask")
"""Arguments that SimpleTuner's models take with an entry a token as well as one an item."""

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class RowArgument:
    """One argument: a tensor, or a tuple, list or mapping of tensors, each with a row for each token.

    Parameters
    ----------
    name : str
    axis : int
        Of the rows, in each tensor; negative ones count from the end.
    before, after : int or "text"
        Rows that stand before and after those of the image stream and stay; "text": as many as the
        call has text tokens.
    """

    name: str
    axis: int
    before: int | str = 0
    after: int | str = 0

    @classmethod
    def of(cls, name: str, given: Any) -> RowArgument:
        """From ``axis``, ``(axis, before)`` or ``(axis, before, after)``.

        Raises
        ------
        ConfigError
            If it is none of these.

        Examples
        --------
        >>> RowArgument.of("rotary", (0, "text"))
        RowArgument(name='rotary', axis=0, before='text', after=0)
        """
        parts = given if isinstance(given, tuple) else (given,)
        right = 1 <= len(parts) <= 3 and _is_int(parts[0])
        if not right or not all(part == TEXT or (_is_int(part) and part >= 0) for part in parts[1:]):
            raise ConfigError(
                "rows must give the axis of an argument's rows, or (axis, rows before, rows after) with numbers or "
                f'"text" for the rows that stand around those of the image stream, got {given!r} for {name}'
            )
        return cls(name, *parts)

    @property
    def alone(self) -> bool:
        """Whether it has rows of the image stream and no others."""
        return (self.before, self.after) == (0, 0)

    def cut(self, value: Any, layout: TokenLayout, rows: Tensor) -> Any:
        """`value` with only these rows of the image stream, what stands before and after them as it was.

        Raises
        ------
        LayoutError
            If it is not made of tensors, or their rows are not those of the call.
        """
        if value is None:
            return None
        if isinstance(value, Tensor):
            return self._cut(value, layout, rows)
        if isinstance(value, Mapping):
            return type(value)({key: self.cut(each, layout, rows) for key, each in value.items()})  # type: ignore[call-arg]
        if isinstance(value, tuple | list):
            parts = [self.cut(each, layout, rows) for each in value]
            return (
                type(value)(parts) if type(value) in (tuple, list) else type(value)(*parts)
            )  # the fields of a named one
        raise LayoutError(
            f"{self.name} must be a tensor with a row for each token, or a tuple, list or mapping of such tensors, "
            f"got {type(value).__name__}"
        )

    def _cut(self, x: Tensor, layout: TokenLayout, rows: Tensor) -> Tensor:
        before, after = (layout.text if n == TEXT else n for n in (self.before, self.after))
        assert isinstance(before, int)
        assert isinstance(after, int)
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != before + layout.rows + after:
            around = "" if self.alone else f", {before} before and {after} after them"
            raise LayoutError(
                f"{self.name} must have the {layout.rows} rows of the image stream{around} on axis {self.axis}, got "
                f"shape {tuple(x.shape)}. Rows that stand around them, such as those of {layout.text} text tokens, are "
                f'named: rows={{"{self.name}": ({self.axis}, before, after)}}'
            )
        axis = self.axis % x.ndim
        if not before and not after:
            return pack_rows(x, rows.to(x.device), axis)
        inner = pack_rows(x.narrow(axis, before, layout.rows), rows.to(x.device), axis)
        return torch.cat([x.narrow(axis, 0, before), inner, x.narrow(axis, before + layout.rows, after)], axis)


def by_token(kwargs: Kwargs, rows: int) -> dict[str, int]:
    """Which of `BY_TOKEN` a call gives with an entry for each of the image stream's `rows`, and the axis of these.

    Examples
    --------
    >>> by_token({"timestep": torch.zeros(2, 6), "guidance": torch.ones(2)}, rows=6)
    {'timestep': 1}
    """
    given = {name: kwargs.get(name) for name in BY_TOKEN}
    return {name: 1 for name, x in given.items() if isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == rows}


def unpadded(kwargs: Kwargs, rows: int) -> str | None:
    """Why calls with entries by token cannot run together, in words; None for a call without."""
    named = ", ".join(by_token(kwargs, rows))
    return f"an entry for each token cannot be padded, got {named} with {rows} of them" if named else None


def take_rows(kwargs: Kwargs, names: Mapping[str, int], rows: Tensor) -> Kwargs:
    """Arguments with `rows` of each named tensor along its axis (negative axes count from the end).

    Raises
    ------
    LayoutError
        If they have not all as many rows.
    """
    out = dict(kwargs)
    counts = {name: out[name].shape[axis] for name, axis in names.items() if out.get(name) is not None}
    if len(set(counts.values())) > 1:
        raise LayoutError(f"arguments with a row for each token must have the same number of rows, got {counts}")
    for name, axis in names.items():
        if out.get(name) is not None:
            out[name] = pack_rows(out[name], rows.to(out[name].device), axis % out[name].ndim)
    return out


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""A DiT that is not from diffusers: say where its tokens are, and it is served like the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..cost import ModelShape
from ..errors import ConfigError, IncompatibleError, LayoutError
from ..hooks.diffusers import Attention, AttentionSite, Route
from ..selection import Reduced
from ..types import TokenLayout
from . import masks
from .alone import NamedAlone
from .base import Adapter, Found, Kwargs
from .position_ids import grid_of_ids, place_by_ids
from .row_arguments import RowArgument, take_rows
from .serving import check_arguments
from .stream import own_layout, own_rows

__all__ = ["PlainAdapter"]


_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _SdpaRoute(TorchFunctionMode):
    """Answers every scaled_dot_product_attention of this thread, in order; calls of kind "other" are passed over."""

    def __init__(self, attend: Route, kinds: Sequence[str]) -> None:
        super().__init__()
        self._attend, self._kinds, self._calls = attend, kinds, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call, self._calls = self._calls, self._calls + 1
        if call >= len(self._kinds):
            raise LayoutError(f"attention must name each of a forward's attention calls, got {self._kinds}")
        if self._kinds[call] == "other":
            return func(*args, **kwargs)
        return self._answer(call, func, {**dict(zip(_SDPA, args, strict=False)), **kwargs})

    def _answer(self, call: int, func: Attention, given: dict[str, Any]) -> Tensor:
        if given.get("is_causal"):
            raise LayoutError(f"measured attention must look at all keys, got a causal call {call}")
        query, key, value = (given.pop(name) for name in _SDPA[:3])
        own_mask = given.pop("attn_mask", None)

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))

        def user(k: Tensor = k, v: Tensor = v, mask: Tensor | None = own_mask) -> Tensor:
            return func(query, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, **given).transpose(1, 2)

        if given.get("scale") is not None:  # attention is looked at with the default scale C ** -0.5
            q = q * (given["scale"] * q.shape[-1] ** 0.5)
        mask = None if own_mask is None else own_mask[(None,) * (4 - own_mask.ndim)]
        return self._attend(call, q, k, v, mask, user).transpose(1, 2)


class PlainAdapter(Adapter):
    """Adapter for any transformer whose forward takes a token sequence.

    Parameters
    ----------
    tokens : str
        Argument that holds the image stream, (B, rows, D). References are rows of it, or of `references`. Where the
        model cuts the generation into tokens itself, and references stand apart, the argument of its position ids will
        do, which has a row for each token too. Where there is none, `tokens` may name the references' argument: the
        generation is then ``(0, 0)`` in what `find` returns, tokens are dropped, and by a rule that measures no
        attention.
    find : callable
        From all arguments by name to ``((first generation row, number), references)``, or None
        when the layout is not known (the call then runs dense). Called once a run. See `references_from_ids`.
    rows : mapping of str to int or tuple
        Further arguments that hold one entry a row (position ids, rotary tables), and the axis of
        their rows. Tensors, or tuples such as (cos, sin), lists and mappings of them. Where other
        rows stand around those of the image stream, ``(axis, before)`` or ``(axis, before, after)``,
        numbers of rows or "text" for as many as there are text tokens: ``{"rotary": (0, "text")}``.
    references : str, optional
        Argument that holds the references, (B, R, D), where they stand apart. Their rows count behind those of
        `tokens`, in `find` and in `rows`, and attention must have them there: text, `tokens`, `references`. It and
        `reference_rows` are None in a call without reference rows, which reads stored ones.
    reference_rows : mapping of str to int or tuple
        As `rows`, of arguments with one entry for each row of `references` alone.
    text : str, optional
        Argument with the text tokens (B, text, D) that stand before the image stream in joint
        attention. Default none.
    attention : sequence of str
        Kind of each ``scaled_dot_product_attention`` call of one forward, in order: "double" or
        "single", which see all tokens, (B, H, S, C), or "other" (cross-attention), which is not
        measured. Selectors that look at attention, and a cache of reference keys and values, need it.
    conditional : callable, optional
        From the arguments to the batch items that are scored, where guidance is batched.
    mask : str, optional
        Argument that holds a mask of joint attention, text first, or whose entry ``attention_mask`` does: bool or
        floating, (B, S) for keys or as ``scaled_dot_product_attention`` takes it. It is cut with the tokens.
    positions : str, optional
        Which of `rows`, or of `reference_rows`, holds (frame, y, x) ids, so that rivals can place changed tokens.
    grid : callable, optional
        From the arguments to the generation's (height, width) in tokens, whose rows run left to right, top to bottom;
        default that of `positions`. A cache that is read per tile needs it.
    alone : callable, optional
        ``alone(kwargs, layout, rows, timestep)``: the arguments of a call on `rows` of references alone, (K,) int64
        ascending, without what depends on prompt, noise and step. References that run by themselves need it.
    shape : callable, optional
        From the transformer to its `cost.ModelShape`, so that the summary can count its work.
    name : str
        In tables and messages.

    Examples
    --------
    ``Flux`` of Black Forest Labs' own repository, whose sampler appends the reference to ``img`` and ``img_ids``:

    >>> from sparse_ref_attn import references_from_ids, register_adapter
    >>> adapter = PlainAdapter(
    ...     tokens="img",  # (B, rows, 64): the picture being made, then the reference
    ...     rows={"img_ids": 1},  # (B, rows, 3): dropped tokens take their ids along
    ...     find=lambda kwargs: references_from_ids(kwargs["img_ids"]),  # the reference has frame 1
    ...     text="txt",  # its tokens come first in attention
    ...     attention=["double"] * 19 + ["single"] * 38,  # one call a block, which can be measured
    ...     positions="img_ids",  # where merged tokens are put, and the grid of the picture
    ... )
    >>> register_adapter("flux.model.Flux", adapter)
    """

    def __init__(
        self,
        tokens: str,
        find: Callable[[Kwargs], Found | None],
        rows: Mapping[str, int | tuple[int | str, ...]] | None = None,
        *,
        references: str | None = None,
        reference_rows: Mapping[str, int | tuple[int | str, ...]] | None = None,
        text: str | None = None,
        attention: Sequence[str] = (),
        conditional: Callable[[Kwargs], slice] | None = None,
        mask: str | None = None,
        positions: str | None = None,
        grid: Callable[[Kwargs], tuple[int, int] | None] | None = None,
        alone: Callable[[Kwargs, TokenLayout, Tensor, float], Kwargs] | None = None,
        shape: Callable[[nn.Module], ModelShape] | None = None,
        name: str = "plain",
    ) -> None:
        unknown = sorted(set(attention) - {"double", "single", "other"})
        if unknown:
            raise ConfigError(f'attention must be made of "double", "single" and "other", got {unknown}')
        if reference_rows and references is None:
            raise ConfigError(
                f"reference_rows are those of an argument for references alone: name it (references=), got "
                f"{sorted(reference_rows)}"
            )
        named = {**(rows or {}), **(reference_rows or {})}
        if positions is not None and positions not in named:
            raise ConfigError(f"positions must be one of rows {sorted(named)}, got {positions!r}")
        self.tokens, self.text_tokens, self.references = tokens, text, references
        self.name = name  # type: ignore[misc]
        self._find = find
        self._rows = {name: RowArgument.of(name, given) for name, given in (rows or {}).items()}
        self._own = {name: RowArgument.of(name, given) for name, given in (reference_rows or {}).items()}
        self._attention, self._conditional, self._positions = tuple(attention), conditional, positions
        self._shape, self._grid = shape, grid
        self.alone = None if alone is None else NamedAlone(alone)
        self.attention_arguments = mask or ""

    def check(self, transformer: nn.Module) -> None:
        check_arguments(self, transformer, [self.tokens, self.references, self.text_tokens, *self._rows, *self._own])

    def find(self, kwargs: Kwargs) -> Found | None:
        return self._find(kwargs)

    def layout(self, kwargs: Kwargs, found: Found) -> TokenLayout:
        layout = super().layout(kwargs, found)
        self._check_unnamed(kwargs, layout)
        if self._conditional is None:
            return layout
        return TokenLayout(layout.rows, layout.text, layout.generation, layout.references, self._conditional(kwargs))

    def _check_unnamed(self, kwargs: Kwargs, layout: TokenLayout) -> None:
        """Raise where an argument that calls itself a mask is as long as the sequence, and would not be cut with it."""
        known = {self.tokens, self.attention_arguments, *self._rows, *self._own}
        given = {**kwargs, **{n: v for part in kwargs.values() if isinstance(part, dict) for n, v in part.items()}}
        if self.attention_arguments:
            known.add(masks.MASK)
        for name, value in given.items():
            lengths = (layout.rows, layout.text + layout.rows)
            if "mask" in name and name not in known and isinstance(value, Tensor) and value.shape[-1] in lengths:
                raise LayoutError(
                    f"a mask of the {lengths[1]} joint rows must be named to the {self.name} adapter "
                    f"(mask={name!r}), and one of the {lengths[0]} image rows in rows, got {name} {tuple(value.shape)}"
                )

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        if self._grid is not None:
            return self._grid(kwargs)
        ids = kwargs.get(self._positions) if self._positions in self._rows else None
        return grid_of_ids(ids, layout) if isinstance(ids, Tensor) and ids.ndim > 1 else None

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        cut = self.cut_mask(kwargs, layout, rows)
        if self.references is None:
            short = take_rows(cut, {self.tokens: 1}, rows)
        else:
            own, apart = own_layout(layout), own_rows(layout, rows)
            if apart.shape[0]:
                short = take_rows(cut, {self.references: 1}, apart)
                short |= {name: row.cut(kwargs[name], own, apart) for name, row in self._own.items() if name in kwargs}
            else:
                short = {**cut, self.references: None, **dict.fromkeys(self._own)}
        return short | {
            name: each.cut(kwargs[name], layout, rows) for name, each in self._rows.items() if name in kwargs
        }

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        tokens, rows = (self.tokens, self._rows) if self.references is None else (self.references, self._own)
        others = set(self._rows) | set(self._own)
        if self._positions not in rows or others != {self._positions} or not rows[self._positions].alone:
            return super().replace(kwargs, layout, reduced)
        where = layout if self.references is None else own_layout(layout)
        placed = place_by_ids({"hidden_states": kwargs[tokens], "img_ids": kwargs[self._positions]}, where, reduced)
        kwargs = self.reduce_mask(kwargs, layout, reduced)
        return {**kwargs, tokens: placed["hidden_states"], self._positions: placed["img_ids"]}

    def sites(self, transformer: nn.Module) -> list[AttentionSite]:
        return [AttentionSite(None, kind) for kind in self._attention]

    def shape(self, transformer: nn.Module) -> ModelShape:
        return super().shape(transformer) if self._shape is None else self._shape(transformer)

    def check_measurable(self, transformer: nn.Module) -> None:
        if not self.routable(transformer):
            raise IncompatibleError(
                f"this selector looks at attention: tell the {self.name} adapter the kind of each attention call, "
                'for example attention=["single"] * len(blocks)'
            )

    def routable(self, transformer: nn.Module) -> bool:
        return bool(set(self._attention) - {"other"})

    @contextlib.contextmanager
    def route(self, transformer: nn.Module, attend: Route) -> Iterator[None]:
        with _SdpaRoute(attend, self._attention):
            yield

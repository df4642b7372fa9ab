"""Z-Image's own methods stood in for, where a call runs on a part of its pictures' tokens, or on changed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.depth import DepthCut
from ...adapters.joint_order import unpick
from ...adapters.shortened import Shortened
from ...adapters.token_form import FORM
from ...functional import pack_rows
from ...hooks.instance import InstanceHook
from ...hooks.instance_method import InstanceMethod
from .parts import Parts, filled

__all__ = ["depth_hooks", "kept_tokens"]

# Of what `patchify_and_embed_omni` gives: a list of the items' entries each.
_ROWS, _POSITIONS, _PADDING, _OFFSETS, _NOISE = 0, 4, 7, 10, 11


def kept_tokens(transformer: nn.Module, shortened: Callable[[], Shortened | None]) -> list[Callable[[], None]]:
    """Hooks, as removers, by which the model's forward has the tokens of a shortened call."""

    config: Any = transformer.config

    def as_given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts = kwargs.get(FORM)
        if parts is None:
            return None
        given = {name: value for name, value in kwargs.items() if name not in (FORM, "timestep")}
        return args, {**given, "x": parts.x, "cap_feats": parts.captions}

    def patchified(own: Callable[..., tuple[Any, ...]], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        out, call = own(*args, **kwargs), shortened()
        if call is None:
            return out
        made, parts = list(out), call.kwargs[FORM]
        if call.reduced is None:
            _keep(made, parts, call.rows)
        else:
            _change(made, parts, call)
        made[_OFFSETS] = [(first, first + len(x)) for (first, _), x in zip(out[_OFFSETS], made[_ROWS], strict=True)]
        return tuple(made)

    def turned(own: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """At fractional positions as the model's tables have whole ones."""
        if not ids.is_floating_point():
            return own(ids)
        found = []
        for at, size in zip(ids.double().unbind(1), config.axes_dims, strict=True):
            steps = torch.arange(0, size, 2, dtype=torch.float64, device=ids.device)
            angles = torch.outer(at, 1.0 / config.rope_theta ** (steps / size)).float()
            found.append(torch.polar(torch.ones_like(angles), angles))
        return torch.cat(found, 1)

    def unpatchified(own: Callable[..., Any], x: Any, size: Any, patch: int, frames: int, offsets: Any = None) -> Any:
        call = shortened()
        if call is None:
            return own(x, size, patch, frames, offsets)
        last = call.kwargs[FORM].last
        return own(x, [each[-1:] for each in size], patch, frames, [(end - last, end) for _, end in offsets])

    methods: dict[str, Callable[..., Any]] = {
        "patchify_and_embed_omni": patchified, "rope_embedder": turned, "unpatchify": unpatchified,
    }  # fmt: skip
    return [
        transformer.register_forward_pre_hook(InstanceHook(transformer, as_given), with_kwargs=True).remove,
        *(InstanceMethod(transformer, name, call).remove for name, call in methods.items()),
    ]


def _keep(made: list[Any], parts: Parts, tokens: Tensor) -> None:
    rows = parts.stays(tokens)
    for at in (_ROWS, _POSITIONS, _PADDING):
        made[at] = [pack_rows(each, rows, 0) for each in made[at]]
    others, wanted = parts.rows - parts.last, len(rows) - parts.last
    for i, noise in enumerate(made[_NOISE]):
        alike = len(set(noise[:others])) <= 1
        before = noise[:1] * wanted if alike else [noise[row] for row in rows[:wanted].tolist()]
        made[_NOISE][i] = before + noise[others:]


def _change(made: list[Any], parts: Parts, call: Shortened) -> None:
    """Each reference has other tokens, at other positions, before its padding."""
    assert call.reduced is not None
    for i, (rows, ids, padding, noise) in enumerate(
        zip(*(made[at] for at in (_ROWS, _POSITIONS, _PADDING, _NOISE)), strict=True)
    ):
        at, new, places, added, noises = 0, [], [], [], []
        for size, reduced in zip(parts.sizes, call.reduced, strict=False):
            end, tokens = at + filled(size), parts.as_given(reduced.tokens[i].to(rows))
            frame = ids[at, :1].expand(len(tokens), 1)
            new += [tokens, rows[at + size : end]]
            places += [torch.cat([frame, reduced.positions.to(ids.device)], 1), ids[at + size : end]]
            added += [padding.new_zeros(len(tokens)), padding[at + size : end]]
            noises += noise[at : at + 1] * (len(tokens) + end - at - size)
            at = end
        made[_ROWS][i] = torch.cat([*new, rows[at:]])
        made[_POSITIONS][i] = torch.cat([*places, ids[at:]])
        made[_PADDING][i] = torch.cat([*added, padding[at:]])
        made[_NOISE][i] = noises + noise[at:]


def depth_hooks(transformer: nn.Module, cut: DepthCut) -> list[Callable[[], None]]:
    """Hooks, as removers, of a call whose blocks cut its rows: between and behind them the model counts them all."""

    def whole(x: Tensor, kind: str) -> Tensor:
        if cut.kept is None:
            return x
        places, rows = cut.places(kind)
        return x if x.shape[1] == rows else unpick(x, places, rows)

    def joined(own: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(whole(x, "image"), *args, **kwargs)

    def last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (whole(args[0], "single"), *args[1:])

    layers: Any = transformer.all_final_layer
    return [
        InstanceMethod(transformer, "_build_unified_sequence", joined).remove,
        *(layer.register_forward_pre_hook(InstanceHook(layer, last)).remove for layer in layers.values()),
    ]

"""References that run through the model by themselves, and calls without their rows."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ...adapters.alone import check_alone, references_alone
from ...adapters.base import Adapter, Kwargs
from ...adapters.shortened import Shortened
from ...errors import IncompatibleError
from ...hooks.diffusers import Attention
from ...isolation import Isolation
from ..call import Call
from .joint import JointAttention

__all__ = ["check_isolates", "isolated_layers", "without_references"]

Layers = list[tuple[Tensor, Tensor]]


def check_isolates(adapter: Adapter, attention: JointAttention) -> None:
    """Raise IncompatibleError where a model's references cannot run by themselves."""
    check_alone(adapter)
    if not attention.layers:
        raise IncompatibleError(
            f"references that run by themselves are read by {adapter.name}'s attention, which must be known and go "
            "through processors that dispatch to attention backends, or be named to a PlainAdapter: "
            'attention=["single"] * len(blocks)'
        )


def isolated_layers(call: Call, attention: JointAttention, isolation: Isolation) -> Layers:
    """Keys and values of every reference token, (B, R, H, C) after QK-norm and RoPE, of each layer.

    They come of calls of the model on the references alone, which stand in the graph where gradients are wanted.
    """
    parts = [_of_pass(call, attention, tokens, isolation) for tokens in isolation.passes(call.layout.sizes)]
    if len(parts) == 1:
        return parts[0]
    layers = zip(*parts, strict=True)
    return [(torch.cat([k for k, _ in layer], 1), torch.cat([v for _, v in layer], 1)) for layer in layers]


def _of_pass(call: Call, attention: JointAttention, tokens: range, isolation: Isolation) -> Layers:
    adapter, gradients = call.adapter, torch.is_grad_enabled()
    kwargs, rows = references_alone(adapter, call.kwargs, call.layout, tokens, isolation.timestep)
    text = 0 if adapter.text_tokens is None else kwargs[adapter.text_tokens].shape[1]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def take(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
        if gradients != torch.is_grad_enabled():
            raise IncompatibleError(
                "blocks whose references run by themselves must be checkpointed without reentrance "
                "(use_reentrant=False, the default of enable_gradient_checkpointing), got a block without gradients"
            )
        found[layer] = k[:, text:], v[:, text:]
        return own()

    outer, call.contexts = call.contexts, contextlib.ExitStack()
    call.shortened = Shortened(call.kwargs, rows, call.layout.rows)
    try:
        with call.contexts:
            attention.answer(call, text + len(tokens), take, eager=True, again=False)
            call.module(**kwargs)
    finally:
        call.contexts, call.shortened = outer, None
    if len(found) != len(attention.layers):
        raise IncompatibleError(
            f"each of the {len(attention.layers)} attention layers must attend over the {len(tokens)} reference tokens "
            f"alone, for their keys and values to be taken; got {len(found)} that did"
        )
    return [found[layer] for layer in range(len(attention.layers))]


def without_references(call: Call) -> Kwargs:
    """The arguments with the generation's rows of the image stream alone; the call is `shortened` to them."""
    first, length = call.layout.generation
    rows = torch.arange(first, first + length, device=call.device)
    call.shortened = Shortened(call.kwargs, rows, call.layout.rows)
    return call.adapter.drop(call.kwargs, call.layout, rows)

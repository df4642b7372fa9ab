"""References that run through the model by themselves, and calls without their rows."""

from __future__ import annotations

import contextlib
import time

import torch
from torch import Tensor, nn

from ...adapters.alone import check_alone, references_alone
from ...adapters.base import Adapter, Kwargs
from ...adapters.shortened import Shortened
from ...config import SparseRef
from ...errors import IncompatibleError
from ...execution import Cache
from ...hooks.diffusers import Attention, splits_the_sequence, step_cache_active
from ...isolation import Isolation
from ...timing import Stopwatch
from ..call import Call, GenerationCall
from ..reuse import CacheReuse
from .joint import JointAttention

__all__ = ["OwnPass", "check_isolates", "check_kept", "isolated_layers", "without_references"]

Layers = list[tuple[Tensor, Tensor]]


def check_isolates(adapter: Adapter, module: nn.Module, attention: JointAttention) -> None:
    """Raise IncompatibleError where a model's references cannot run by themselves, as it is now."""
    check_alone(adapter)
    if splits_the_sequence(module):
        raise IncompatibleError(
            "references that run by themselves need the whole sequence in one process, got context parallelism: call "
            "disable_parallelism()"
        )
    if step_cache_active(module):
        raise IncompatibleError(
            "references that run by themselves go without a step cache, which would take their call for a step: take "
            "it off"
        )
    if not attention.layers:
        raise IncompatibleError(
            f"references that run by themselves are read by {adapter.name}'s attention, which must be known and go "
            "through processors that dispatch to attention backends, or be named to a PlainAdapter: "
            'attention=["single"] * len(blocks)'
        )


def check_kept(config: SparseRef, module: nn.Module) -> None:
    """Raise IncompatibleError where references were to run by themselves in a model that has them do so, and do not."""
    if isinstance(config.execute, Cache) and config.execute.isolated:
        raise IncompatibleError(
            f"a {type(module).__name__} that keeps its references' keys and values itself must run in the pipeline "
            "that has it do so (Flux2KleinKVPipeline), for references that run by themselves, got calls without its "
            "cache: use that pipeline, or leave isolated out"
        )


class OwnPass:
    """Lets the references of a run run by themselves, once, or takes what they gave in an earlier run.

    Parameters
    ----------
    adapter : Adapter
    config : SparseRef
    isolation : Isolation
    """

    def __init__(self, adapter: Adapter, config: SparseRef, isolation: Isolation) -> None:
        self._adapter, self.isolation = adapter, isolation
        self.reuse = CacheReuse(adapter, config, self._conditions)

    def layers(self, call: GenerationCall, attention: JointAttention) -> Layers:
        """As `isolated_layers`, for the first call of a run."""
        tokens = call.run.references.tokens
        if self.reuse.given is not None:
            return self.reuse.layers(tokens.shape[0])
        wanted = self.reuse.wants(call.module, call.kwargs, call.layout, tokens)
        watch, began = Stopwatch(call.device), time.perf_counter()
        layers = isolated_layers(call, attention, self.isolation)
        watch.stop(call.device)
        call.ahead, call.began = watch, call.began + time.perf_counter() - began
        call.run.record.isolated = tuple(map(len, self.isolation.passes(call.layout.sizes)))
        if wanted:
            self.reuse.keep(layers, None, call.run.record, tokens)
        return layers

    def _conditions(self, kwargs: Kwargs) -> str:
        given = kwargs.get(self._adapter.attention_arguments)
        scale = given.get("scale", 1.0) if isinstance(given, dict) else 1.0
        return f"{self.isolation}, scale={scale} {check_alone(self._adapter).conditions(kwargs)}".rstrip()


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
    short = Shortened(call.kwargs, rows, call.layout.rows)
    try:
        with call.contexts:
            for off in adapter.hooks(call.module, lambda: short):
                call.contexts.callback(off)
            attention.answer(call, text + len(tokens), take, eager=True, again=False)
            call.module(**kwargs)
    finally:
        call.contexts = outer
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

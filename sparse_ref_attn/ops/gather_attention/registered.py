"""Registration with torch: one op forward, one backward, shapes for tracing, and the autograd formula.

Both ops are opaque to the compiler. The backend's name travels as an argument and is resolved inside, so tracing never
asks for the device's properties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import LayoutError
from ..shared.namespace import NAMESPACE
from .arguments import Arguments, HostLayout, check_ranges, check_values
from .backends import BACKWARD, ON_THE_HOST, call_of, choose, implementation, refuse_gradients
from .gradients import Gradients, Wanted

__all__ = ["gather_attention_op"]

TENSORS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? k2, Tensor? v2, Tensor? k_ref, Tensor? v_ref, "
    "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? ref_indices, Tensor? ref_offsets"
)
DIFFERENTIABLE = 7  # q, k, v, k2, v2, k_ref, v_ref come first

library = torch.library.Library(NAMESPACE, "FRAGMENT")
library.define(
    f"gather_attention({TENSORS}, float scale, bool distinct, SymInt[]? host, Tensor? cu_tiles, Tensor? bias, "
    "str backend, bool check) -> (Tensor out, Tensor lse)"
)
library.define(
    f"gather_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {TENSORS}, "
    "float scale, bool distinct, SymInt[]? host, str backend, bool[] wanted) -> Tensor[]"
)


def gather_attention_op(a: Arguments, backend: str, check: bool) -> tuple[Tensor, Tensor]:
    """Out (T, H, C) and lse (H, T), differentiable where there are no query tiles."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*a.tensors, a.bias)):
        refuse_gradients(a.cu_tiles)
    return forward_op(*a, backend, check)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, backend, check = arguments
    a = Arguments(*given)
    layout = HostLayout.of(a) if check or a.host is not None or a.q.device.type == "cpu" else None
    if layout is not None:
        (check_values if check or a.q.device.type == "cpu" else check_ranges)(a, layout)
    if check and a.host is not None and HostLayout.read(a) != layout:
        raise LayoutError(f"host must say what the offsets hold, {HostLayout.read(a)}, got {layout}")
    chosen = choose(backend, call_of(a))
    if chosen in ON_THE_HOST:
        return implementation(chosen).forward(a, layout)
    return implementation(chosen).forward(a)


def _backward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    *given, backend, wanted = arguments
    a = Arguments(*given)
    chosen = choose(backend, call_of(a)._replace(gradients=True))  # as its forward was, though nothing records now
    differentiate = implementation(BACKWARD.get(chosen, chosen)).backward
    grads: Gradients = differentiate(a, grad_out, grad_lse, out, lse, Wanted(*wanted))
    return [a.q.new_empty(0) if g is None else g for g in grads]


library.impl("gather_attention", _forward, "CompositeExplicitAutograd")
library.impl("gather_attention_backward", _backward, "CompositeExplicitAutograd")
forward_op = getattr(torch.ops, NAMESPACE).gather_attention.default
backward_op = getattr(torch.ops, NAMESPACE).gather_attention_backward.default


@torch.library.register_fake(f"{NAMESPACE}::gather_attention", lib=library)
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.register_fake(f"{NAMESPACE}::gather_attention_backward", lib=library)
def _(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    wanted = _each(arguments[-1])
    given = arguments[:DIFFERENTIABLE]
    q = given[0]
    return [q.new_empty(0) if x is None or not w else x.new_empty(x.shape) for x, w in zip(given, wanted, strict=True)]


def _each(wanted: Sequence[bool]) -> list[bool]:
    """From (q, dense, bank) to the seven tensors."""
    q, dense, bank = wanted
    return [q, dense, dense, dense, dense, bank, bank]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    refuse_gradients(inputs[14])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11], *output)
    ctx.rest = (*inputs[11:14], inputs[-2])  # scale, distinct, host, backend
    ctx.inputs = len(inputs)


def _formula(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *given, out, lse = ctx.saved_tensors
    need = ctx.needs_input_grad
    wanted = [need[0], any(need[1:5]), any(need[5:7])]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = backward_op(grad_out, grad_lse, out, lse, *given, *ctx.rest, wanted)
    asked = (g if n and x is not None else None for g, n, x in zip(grads, need, given, strict=False))
    return (*asked, *[None] * (ctx.inputs - DIFFERENTIABLE))


torch.library.register_autograd(f"{NAMESPACE}::gather_attention", _formula, setup_context=_setup, lib=library)

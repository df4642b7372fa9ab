"""Bytes that a call needs at its peak."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .shape import ModelShape
from .tokens import StepTokens

__all__ = ["Memory", "reference_kv_bytes", "room_bytes", "step_memory", "tile_bytes"]

# Joint activations alive at the peak, in tensors of the hidden width, beside the widest Linear layer's input and
# output: residual streams, normed copies, q, k, v, their fp32 copies in RoPE, attention's output. Measured on the meta
# device with Flux, FLUX.2 and Qwen-Image in eager mode under no_grad (within 15 %).
_LIVE_TENSORS = 11


@dataclass(frozen=True)
class Memory:
    """Bytes that a call needs at its peak; the activations are an estimate, see `step_memory`."""

    parameters: int
    activations: int
    reference_kv: int

    @property
    def total(self) -> int:
        return self.parameters + self.activations + self.reference_kv


def reference_kv_bytes(shape: ModelShape, references: int, batch: int = 1) -> int:
    """Bytes of stored keys and values of `references` tokens: 2 x layers x tokens x H x C x element size x batch."""
    return 2 * shape.attention_layers * references * shape.heads * shape.head_dim * shape.dtype_bytes * batch


def room_bytes(shape: ModelShape, rows: int, batch: int = 1) -> int:
    """Bytes of the rooms for a call's own `rows` (text + generation) beside ranked reference K/V: one a two layers."""
    return reference_kv_bytes(replace(shape, attention_layers=-(-shape.attention_layers // 2)), rows, batch)


def tile_bytes(shape: ModelShape, tiles: int, tokens: int, cells: int, batch: int = 1) -> int:
    """Bytes of what `tiles` tiles read: a ranking and a list of `tokens` tokens each (int32), and a weight for each of
    the cells (float32), in every layer; in units of the shape's element size, as the other functions count."""
    return shape.attention_layers * tiles * (8 * tokens + 4 * cells) * batch


def step_memory(shape: ModelShape, tokens: StepTokens, batch: int = 1) -> Memory:
    """Bytes at the peak of one inference call.

    Parameters are exact, and so are the stored reference K/V (of `cached` tokens, or of the references of a split
    step). Activations are an estimate to about 15 % for eager diffusers transformers under ``no_grad`` with an
    attention kernel that does not store the S x S matrix: 11 joint tensors of the hidden width plus the widest
    Linear layer's input and output. Gradients, the VAE and the text encoder are not in it.
    """
    row = _LIVE_TENSORS * shape.heads * shape.head_dim + shape.widest
    return Memory(
        parameters=shape.parameter_bytes,
        activations=batch * (tokens.joint + tokens.dropped) * row * shape.dtype_bytes,
        reference_kv=reference_kv_bytes(shape, tokens.references if tokens.split else tokens.cached, batch),
    )

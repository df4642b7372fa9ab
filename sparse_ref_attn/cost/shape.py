"""What the cost of a transformer depends on, read off its Linear layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError

__all__ = ["ModelShape"]

STREAMS = ("image", "text", "joint", "item", "reference_item", "output", "twin", "beside")

# Wrappers that torch.compile, FSDP and peft put into a module's path.
_WRAPPED = re.compile(r"(_orig_mod\.|_fsdp_wrapped_module\.|\.base_layer$|\.lora_[AB]\.[^.]+$)")

# diffusers keeps the separate projections beside a fused one, and runs the fused one only.
_FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}


@dataclass(frozen=True)
class ModelShape:
    """All that the cost of a transformer depends on.

    Parameters
    ----------
    name : str
        The model's class.
    image, text, joint, item, output : int
        Multiply-adds a row, summed over the Linear layers that run on: the image stream (references included), the
        text stream, the joint stream (single-stream blocks), once per batch item (timestep embedding, modulation),
        and the output rows.
    attention_layers, heads, head_dim : int
        Joint attention layers, H and C.
    own_attention_layers : int
        Layers before these in which text, generation and references each look at themselves alone (FLUX.3).
    parameter_bytes : int
        Bytes of the parameters as stored (quantised ones count as such).
    dtype_bytes : int
        Bytes of one activation element.
    output_rows : {"all", "generation"}
        Whether the output layers run on the reference rows too. On a split step they never do.
    reference_item : int
        Multiply-adds of the per-item layers that run a second time where references have a timestep of their own.
    reference_timestep : bool
        Whether references have a timestep of their own at every step (Qwen-Image-Edit's ``zero_cond_t``); on a split
        step they always have.
    widest : int
        Largest input plus output width of a Linear layer that runs on rows.
    leading : tuple of int
        ``leading[i]`` are the multiply-adds of an image row that goes no further than block i: the embedder and the
        blocks before it. Empty when the blocks are not known.
    """

    name: str
    image: int
    text: int
    joint: int
    item: int
    output: int
    attention_layers: int
    heads: int
    head_dim: int
    parameter_bytes: int
    dtype_bytes: int
    output_rows: str = "all"
    reference_item: int = 0
    reference_timestep: bool = False
    widest: int = 0
    leading: tuple[int, ...] = ()
    own_attention_layers: int = 0

    def __post_init__(self) -> None:
        if self.output_rows not in ("all", "generation"):
            raise ConfigError(f'output_rows must be "all" or "generation", got {self.output_rows!r}')
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        if min(counts.values()) < 0 or not self.heads or not self.head_dim:
            raise ConfigError(f"a model's shape must be made of counts >= 0 with heads and head_dim >= 1, got {counts}")

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        streams: Mapping[str, str],
        *,
        attention_layers: int | None = None,
        heads: int | None = None,
        head_dim: int | None = None,
        output_rows: str = "all",
        reference_timestep: bool = False,
        blocks: Sequence[str] = (),
        own_attention_layers: int = 0,
    ) -> ModelShape:
        """Read the shape off a transformer, on any device including meta; nothing is run.

        Parameters
        ----------
        module : nn.Module
            The transformer. Quantised, LoRA-adapted and compiled Linear layers are recognised.
        streams : mapping of str to str
            Regular expression over a Linear layer's whole name -> "image", "text", "joint", "item", "reference_item"
            (once an item, and once more for references with a timestep of their own), "output", or "twin": runs on the
            references alone, where an equal layer of the "image" stream runs on the generation alone. Those "beside"
            run on other rows, such as sound, and are not counted. The first match counts.
        attention_layers, heads, head_dim : int, optional
            By default read from ``module.config`` as diffusers names them.
        output_rows, reference_timestep, own_attention_layers
            See `ModelShape`.
        blocks : sequence of str
            Name of each block in order of execution, for `leading`.

        Raises
        ------
        UnsupportedModelError
            If a Linear layer's name matches no expression; the message lists them.
        ConfigError
            If a stream is unknown, or the attention's shape is neither given nor in ``module.config``.

        Examples
        --------
        >>> shape = ModelShape.from_module(
        ...     nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), {"0": "image", "1": "output"},
        ...     attention_layers=1, heads=2, head_dim=4)
        >>> shape.image, shape.output, shape.parameter_bytes
        (32, 32, 304)
        """
        unknown = sorted(set(streams.values()) - set(STREAMS))
        if unknown:
            raise ConfigError(f"a stream must be one of {STREAMS}, got {unknown}")
        patterns = [(re.compile(pattern), stream) for pattern, stream in streams.items()]
        macs, widest, unmatched = dict.fromkeys(STREAMS[:-2], 0), 0, []
        by_block: Counter[str | None] = Counter()
        for name, inputs, outputs in _linears(module):
            stream = next((stream for pattern, stream in patterns if pattern.fullmatch(name)), None)
            if stream is None:
                unmatched.append(name)
            if stream in (None, "twin", "beside"):
                continue
            macs[stream] += inputs * outputs
            if stream in ("image", "joint"):
                by_block[next((block for block in blocks if name.startswith(block + ".")), None)] += inputs * outputs
            if stream not in ("item", "reference_item"):
                widest = max(widest, inputs + outputs)
        if unmatched:
            raise UnsupportedModelError(
                f"every Linear layer of {type(module).__name__} must match an expression of the stream map, "
                f"got {len(unmatched)} that match none: {', '.join(unmatched[:20])}{', ...' * (len(unmatched) > 20)}"
            )
        config = getattr(module, "config", None)
        if attention_layers is None:
            attention_layers = _setting(config, "num_layers") + _setting(config, "num_single_layers", 0)
        return cls(
            name=type(module).__name__,
            attention_layers=attention_layers,
            heads=_setting(config, "num_attention_heads") if heads is None else heads,
            head_dim=_setting(config, "attention_head_dim") if head_dim is None else head_dim,
            parameter_bytes=sum(_stored_bytes(p) for p in module.parameters()),
            dtype_bytes=_activation_bytes(module),
            output_rows=output_rows,
            reference_timestep=reference_timestep,
            widest=widest,
            own_attention_layers=own_attention_layers,
            leading=tuple(accumulate([by_block[block] for block in blocks[:-1]], initial=by_block[None]))
            if blocks
            else (),
            **macs,
        )


def _linears(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name, input and output width of every Linear layer that runs: nn.Linear, its subclasses and look-alike leaves."""
    modules = [(_WRAPPED.sub("", name), m) for name, m in module.named_modules()]
    unused: set[str] = set()
    for name, _ in modules:
        parent, dot, leaf = name.rpartition(".")
        unused.update(parent + dot + part for part in _FUSED.get(leaf, ()))
    for name, m in modules:
        leaf_module = isinstance(m, nn.Linear) or next(m.children(), None) is None
        inputs, outputs = getattr(m, "in_features", None), getattr(m, "out_features", None)
        if leaf_module and isinstance(inputs, int) and isinstance(outputs, int) and name not in unused:
            yield name, inputs, outputs


def _setting(config: Any, name: str, default: int | None = None) -> int:
    value = config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)
    if value is None:
        raise ConfigError(f"the attention's shape must be given or stand in the model's config, got no {name} there")
    return int(value)


def _stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of a quantised (wrapper subclass) tensor those of the tensors inside it."""
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _activation_bytes(module: nn.Module) -> int:
    """Element size of the floating-point dtype that most parameters claim; 2 where that is an 8-bit storage format."""
    elements: dict[torch.dtype, int] = {}
    for p in module.parameters():
        if p.dtype.is_floating_point:
            elements[p.dtype] = elements.get(p.dtype, 0) + p.numel()
    if not elements:
        raise ConfigError(f"{type(module).__name__} must have floating-point parameters, got none")
    return max(2, max(elements, key=lambda dtype: elements[dtype]).itemsize)

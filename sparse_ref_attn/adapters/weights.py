"""Tells two sets of weights apart without reading them all, wherever and however they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError
from ..hooks.diffusers import offload_hook, tensors_on_disk

__all__ = ["weights_fingerprint"]

SAMPLES = 16  # elements of each tensor


def weights_fingerprint(module: nn.Module) -> str:
    """SHA-256 of a sample of every weight, with names, shapes, dtypes, quantisation, and LoRA scales and states.

    Notes
    -----
    The bytes of 16 evenly spaced elements of each tensor of the module's state are read: enough to tell checkpoints
    and adapters apart, not to notice that a few weights were changed by hand. Quantised weights are read as they are
    stored. Weights that accelerate or diffusers has offloaded, to memory or to disk, are read where they lie, never
    from the placeholder: the result is that of the same weights in memory, and of every process. One host sync.

    Raises
    ------
    IncompatibleError
        If a weight is nowhere: on the meta device, not initialised or freed, and no offload hook has it.

    Examples
    --------
    >>> layer = nn.Linear(4, 4)
    >>> before = weights_fingerprint(layer)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> weights_fingerprint(layer) == before
    False
    """
    digest = hashlib.sha256()
    samples: list[Tensor] = []
    offloaded = _Offloaded(module)
    for name, value in module.state_dict(keep_vars=True).items():
        for label, part in _leaves(name.replace("_orig_mod.", ""), offloaded.found(name, value)):
            if isinstance(part, Tensor):
                digest.update(f"{label} {tuple(part.shape)} {part.dtype};".encode())
                samples.append(_sample(label, part))
            else:
                digest.update(f"{label} {part};".encode())
    for name, m in module.named_modules():
        state = [getattr(m, key, None) for key in ("scaling", "active_adapters", "merged_adapters", "disable_adapters")]
        if isinstance(state[0], dict):
            digest.update(f"{name} {sorted(state[0].items())} {state[1:]};".encode())
    if samples:
        digest.update(torch.cat([s.to(samples[0].device) for s in samples]).cpu().numpy().tobytes())
    return digest.hexdigest()


class _Offloaded:
    """Where weights lie that are not where the module has them."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = dict(module.named_modules())
        self._files = tensors_on_disk(module)

    def found(self, name: str, value: Any) -> Any:
        """The weight itself in place of a placeholder; `value` where it is one already or nobody has it."""
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._files:
            from safetensors import safe_open

            path, key = self._files[id(value)]
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)
        if not value.is_meta:
            return value
        parts = name.split(".")
        for depth in range(len(parts) - 1, -1, -1):  # the hook of the nearest module that has one for it
            owner = self._modules.get(".".join(parts[:depth]))
            hook = offload_hook(owner)
            for each in getattr(hook, "hooks", (hook,)):
                weights = getattr(each, "weights_map", None)
                try:
                    stored = None if weights is None else weights[".".join(parts[depth:])]
                except KeyError:
                    continue
                if stored is not None:
                    return stored
        return value


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The plain tensors that a weight consists of, and in words what else makes it what it is."""
    if isinstance(value, Tensor):
        yield from _parts(name, value)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _leaves(f"{name}.{key}", value[key])
    elif isinstance(value, tuple | list):
        for i, each in enumerate(value):
            yield from _leaves(f"{name}.{i}", each)
    elif isinstance(value, Enum):
        yield name, f"{type(value).__name__}.{value.name}"
    elif value is None or isinstance(value, str | bytes | bool | int | float | torch.dtype | torch.Size):
        yield name, repr(value)
    else:  # whose repr may be its address
        yield name, type(value).__qualname__


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        where = "not initialised" if nn.parameter.is_lazy(tensor) else "on the meta device"
        raise IncompatibleError(
            f"a reference cache is kept for weights that can be read, got {name} {where}, and no offload hook that "
            "says where it lies"
        )
    if type(tensor) in (Tensor, nn.Parameter, nn.Buffer):
        yield from _plain(name, tensor)
    elif hasattr(tensor, "__tensor_flatten__"):  # a wrapper around the tensors that it stores
        names, context = tensor.__tensor_flatten__()
        yield from _leaves(f"{name} as {type(tensor).__qualname__}", context)
        for each in names:
            yield from _leaves(f"{name}.{each}", getattr(tensor, each))
    else:  # its own storage under another meaning, such as GGUF's blocks
        about = {key: value for key, value in vars(tensor).items() if key.startswith("quant")}
        yield from _leaves(f"{name} as {type(tensor).__qualname__}", about)
        with torch._C.DisableTorchFunctionSubclass():
            yield from _plain(name, tensor.detach().as_subclass(Tensor))


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
    tensor = tensor.detach()
    if tensor.is_quantized:
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield name, f"scale {tensor.q_scale()} zero {tensor.q_zero_point()}"
        else:
            yield f"{name} scales", tensor.q_per_channel_scales()
            yield f"{name} zeros", tensor.q_per_channel_zero_points()
        yield name, tensor.int_repr()
    elif tensor.layout is not torch.strided:
        sparse = tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor.to_sparse_coo().coalesce()
        yield f"{name} at", sparse.indices()
        yield f"{name} of {tuple(tensor.shape)}", sparse.values()
    else:
        yield name, tensor


def _sample(name: str, tensor: Tensor) -> Tensor:
    """Bytes (n,) of evenly spaced elements; syncs nothing."""
    needed = (
        0 if not tensor.numel() else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    )
    if tensor.untyped_storage().nbytes() < needed * tensor.element_size():
        raise IncompatibleError(f"a reference cache is kept for weights that can be read, and {name} was freed")
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].contiguous().view(torch.uint8)

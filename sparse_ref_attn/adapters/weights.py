"""Tells two sets of weights apart without reading them all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError

__all__ = ["weights_fingerprint"]

SAMPLES = 16  # elements of each parameter


def weights_fingerprint(module: nn.Module) -> str:
    """SHA-256 of a sample of every parameter, with names, shapes and dtypes, and of LoRA scales and states.

    Notes
    -----
    16 evenly spaced elements of each parameter are read: enough to tell checkpoints and adapters apart,
    not to notice that a few weights were changed by hand. One host sync.

    Raises
    ------
    IncompatibleError
        If weights are not at hand (sequential CPU offload keeps them on the meta device).

    Examples
    --------
    >>> layer = nn.Linear(4, 4)
    >>> before = weights_fingerprint(layer)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> weights_fingerprint(layer) == before
    False
    """
    digest, samples = hashlib.sha256(), []
    for name, p in module.named_parameters():
        for part in _parts(p):
            if part.is_meta:
                raise IncompatibleError(
                    "a reference cache is kept for weights that can be read, and sequential CPU offload keeps them on "
                    f"the meta device, got {name} there; use enable_model_cpu_offload"
                )
            digest.update(f"{name} {tuple(part.shape)} {part.dtype};".encode())
            flat = part.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to(torch.float64))
    for name, m in module.named_modules():
        state = [getattr(m, key, None) for key in ("scaling", "active_adapters", "merged_adapters", "disable_adapters")]
        if isinstance(state[0], dict):
            digest.update(f"{name} {sorted(state[0].items())} {state[1:]};".encode())
    if samples:
        digest.update(torch.cat([s.to(samples[0].device) for s in samples]).cpu().numpy().tobytes())
    return digest.hexdigest()


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors inside a quantised (wrapper subclass) tensor; any other one itself."""
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor

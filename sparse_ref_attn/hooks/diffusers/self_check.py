"""Whether the installed diffusers has what the hooks rely on; one that is newer than those tested is tried out."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

import torch
from torch import Tensor

from ...errors import VersionError
from .private_backend import Attention, PrivateBackend
from .versions import TESTED, dispatcher, installed

__all__ = ["check_diffusers"]

_TABLES = ("_backends", "_constraints", "_supported_arg_names")
_WARNED: set[str] = set()


def check_diffusers() -> None:
    """Raise VersionError, with words, where the installed diffusers is too old or the hooks do not work with it.

    With one that is newer than those tested, attention is handed to a private backend once; where that works it is
    used, with one warning a process.
    """
    first, last = (f"{major}.{minor}" for major, minor in TESTED)
    try:
        version, release = installed()
    except importlib.metadata.PackageNotFoundError as error:
        raise VersionError(f"patching this model needs diffusers >= {first}, and diffusers is not installed") from error
    if release < TESTED[0]:
        raise VersionError(f"patching needs diffusers >= {first}, got {version}, which does not have all that it needs")
    registry = getattr(dispatcher(), "_AttentionBackendRegistry", None)
    missing = [name for name in _TABLES if not hasattr(registry, name)]
    if missing:
        raise VersionError(f"diffusers {version} must keep the attention backend registry's {missing}; they are gone")
    if release <= TESTED[1] or version in _WARNED:
        return
    if why := _attention_goes_astray():
        raise VersionError(
            f"diffusers must hand attention to a backend of ours, as {first} to {last} do; {version} does not: {why}"
        )
    _WARNED.add(version)
    warnings.warn(
        f"diffusers {version} is newer than those tested, {first} to {last}; its attention can be seen and answered, "
        "so it is patched: compare a picture that keeps 100 % with the unpatched one",
        stacklevel=2,
    )


def _attention_goes_astray() -> str:
    """What goes wrong when a processor's attention is handed to a private backend; "" where nothing does."""

    class Processor:
        _attention_backend: Any = None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, user: Attention) -> Tensor:
        return user(k, 2 * v, mask)

    processor, q = Processor(), torch.ones(1, 2, 1, 8)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    try:
        backend = PrivateBackend(processor, attend)
        try:
            backend.enter()
            answered = dispatcher().dispatch_attention_fn(
                q, q, q, attn_mask=mask, backend=processor._attention_backend, parallel_config=None
            )
        finally:
            backend.remove()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if torch.allclose(answered, 2 * q) else "it was not asked"

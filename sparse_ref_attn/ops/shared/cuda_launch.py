"""From tensors to the arguments of sra.h; who may launch, and why another call may not."""

from __future__ import annotations

from ctypes import Structure

import torch

from ...errors import BuildError, VersionError
from ...kernels import abi
from ...kernels.library import library
from ...kernels.toolchain import serves

__all__ = ["CHANNELS", "DTYPES", "against", "index", "launch", "pointer", "tensor"]

DTYPES = {torch.float16: 0, torch.bfloat16: 1}
CHANNELS = (64, 128)


def against(device: torch.device) -> list[str]:
    """Why no kernel of the library can run on `device`; empty when one can."""
    try:
        loaded = library()
    except (BuildError, VersionError) as error:
        return [str(error)]
    if device.type != loaded.device:
        return [f"needs a {loaded.device.upper()} device, got {device}"]
    if loaded.device == "cpu":
        return []
    if torch.version.hip is not None:
        return ["needs an NVIDIA card"]
    capability = torch.cuda.get_device_capability(device)
    if any(serves(arch, capability) for arch in loaded.archs):
        return []
    held = ", ".join(f"sm_{arch}" for arch in loaded.archs)
    return [
        f"needs kernels compiled for compute capability {capability[0]}.{capability[1]}, got {held} in {loaded.path}: "
        "`sra build-kernels` builds for the cards it sees"
    ]


def launch(function: str, arguments: Structure, on: torch.Tensor) -> None:
    """Run one function of the library in the current stream of the tensor's device; errors are the library's own."""
    if on.device.type != "cuda":
        library().call(function, arguments, 0)
        return
    with torch.cuda.device_of(on):
        library().call(function, arguments, torch.cuda.current_stream(on.device).cuda_stream)


def tensor(x: torch.Tensor | None, item: int = 0, row: int = 0, head: int = 0) -> abi.Tensor:
    """`x` with its strides in elements; NULL without it."""
    return abi.Tensor() if x is None else abi.Tensor(x.data_ptr(), item, row, head)


def index(x: torch.Tensor | None) -> abi.Index:
    """Contiguous integers; NULL without them."""
    return abi.Index() if x is None else abi.Index(x.data_ptr(), x.element_size())


def pointer(x: torch.Tensor | None) -> int | None:
    """The address of `x`; NULL without it."""
    return None if x is None else x.data_ptr()

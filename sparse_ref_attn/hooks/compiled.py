"""Models that torch has compiled, and models in wrappers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import IncompatibleError

__all__ = ["check_not_compiled", "compiled_blocks", "eager_blocks", "unwrap"]


def unwrap(module: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel, PeftModel and the like."""
    while True:
        base: Any = getattr(module, "get_base_model", None)
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif base is not None:
            module = base()
        else:
            return module


def check_not_compiled(module: nn.Module) -> None:
    """Raise IncompatibleError for a module compiled as a whole: hooks added to it never fire."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    if compiled or type(module).__name__ == "OptimizedModule":
        raise IncompatibleError(
            "the transformer must not be compiled as a whole when it is patched (torch never calls hooks added "
            f"later), got a compiled {type(module).__name__}. Patch first, then compile its blocks: "
            "transformer.compile_repeated_blocks(fullgraph=True)"
        )


def compiled_blocks(module: nn.Module) -> bool:
    """Whether the module or one inside it is compiled."""
    return any(getattr(m, "_compiled_call_impl", None) is not None for m in module.modules())


@contextlib.contextmanager
def eager_blocks(module: nn.Module) -> Iterator[None]:
    """Run compiled blocks eagerly inside, so that a profiling step neither recompiles nor breaks them."""
    if not compiled_blocks(module):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield

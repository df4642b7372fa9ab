"""Models that torch has compiled, and models in wrappers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import IncompatibleError

__all__ = ["check_lengths", "check_not_compiled", "compiled_blocks", "eager_blocks", "unwrap"]


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


def check_lengths(module: nn.Module, lengths: int | None, budget: object) -> None:
    """Raise IncompatibleError where blocks are compiled for one length each and a run has too many of them.

    Parameters
    ----------
    module : nn.Module
    lengths : int, optional
        Different sequence lengths of the run; None: another one at every step of an unknown number.
    budget : object
        What makes them, for the message.
    """
    limit = torch._dynamo.config.recompile_limit
    if (lengths is None or lengths > limit) and any(_static(m) for m in module.modules()):
        raise IncompatibleError(
            f"blocks that are compiled with fullgraph=True and dynamic=False run at most {limit} sequence lengths "
            f"(torch._dynamo.config.recompile_limit), got {'one a step' if lengths is None else lengths} of {budget}. "
            "Use budget.piecewise(n), or compile with dynamic=None"
        )


def _static(module: nn.Module) -> bool:
    """Whether a module is compiled anew for each shape, and may not run uncompiled."""
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        return False
    context = inspect.getclosurevars(compiled).nonlocals.get("self")
    return getattr(context, "_dynamic", None) is False and bool(getattr(context, "fullgraph", False))


@contextlib.contextmanager
def eager_blocks(module: nn.Module) -> Iterator[None]:
    """Run compiled blocks eagerly inside, so that a profiling step neither recompiles nor breaks them."""
    if not compiled_blocks(module):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield

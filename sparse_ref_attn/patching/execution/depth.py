"""References leave by depth: all tokens run through the first blocks, the kept ones through the rest.

For the time of one call the later blocks stand in their ModuleList behind a module that cuts their arguments to the
kept rows. A hook of a block would be compiled into it, and would be gone when gradient checkpointing runs it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import Adapter, Kwargs
from ...adapters.depth import Block, DepthCut
from ...adapters.stream import restored
from ...errors import IncompatibleError, LayoutError
from ...hooks.diffusers import splits_the_sequence, step_cache_active
from ...packing import kept_rows
from ..call import GenerationCall
from ..measuring import listen

__all__ = ["ByDepth", "check_call", "truncate"]

Arguments = dict[str, Any]


class ByDepth:
    """Runs all rows of a call up to the block of its plan, and the kept ones from there on.

    In flight, the plan's selection is made when the block is reached, of what the blocks before it showed.
    """

    alone = True

    def before(self, call: GenerationCall) -> Kwargs:
        listen(call)
        adapter, run, step = call.adapter, call.run, call.at.step

        def choose() -> Tensor | None:
            rest = run.arrive(step) if call.plan.kind == "in_flight" else call.plan
            call.listening.close()
            return None if rest.selection is None else kept_rows(call.layout, rest.selection)

        self._cut = cut = DepthCut(call.layout, choose, lambda kind: adapter.order(call.kwargs, call.layout, kind))

        def shorten(kind: str, block: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
            kwargs = adapter.bind(block, args, kwargs)
            return adapter.drop_in_block(kind, kwargs, cut) if cut.arrive() else kwargs

        for off in adapter.depth_hooks(call.module, cut):
            call.contexts.callback(off)
        call.contexts.enter_context(truncate(adapter.blocks(call.module)[call.plan.from_block :], shorten))
        return call.kwargs

    def after(self, call: GenerationCall, output: Any) -> Any:
        if not self._cut.reached:
            raise LayoutError("where references leave by depth, a later block must run in every call, and none did")
        rows = self._cut.kept
        return output if rows is None else restored(call.adapter, output, rows, call.layout)


def check_call(adapter: Adapter, module: nn.Module, kwargs: Kwargs) -> None:
    """Raise IncompatibleError where a run's first call is one whose blocks do not see all of its rows."""
    why = None
    if step_cache_active(module):
        why = "a step cache, which takes what it skips from a step of one length"
    elif splits_the_sequence(module):
        why = "context parallelism, where a block sees a part of the rows"
    elif adapter.extracts(kwargs):
        why = "a pipeline that stores the references' keys and values of every block"
    if why is not None:
        raise IncompatibleError(
            f"where references leave by depth, a block must get every row of its own call, got {why}. "
            'Drop them at the input: from_block=0, profile="step"'
        )


class _Later(nn.Module):
    """A block after the cut. It keeps all it needs: checkpointing runs it again after the call."""

    def __init__(self, block: nn.Module, cut: Callable[[nn.Module, tuple[Any, ...], Arguments], Arguments]) -> None:
        super().__init__()
        self.block, self._cut = block, cut

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(**self._cut(self.block, args, kwargs))


@contextlib.contextmanager
def truncate(
    blocks: Sequence[Block], cut: Callable[[str, nn.Module, tuple[Any, ...], Arguments], Arguments]
) -> Iterator[None]:
    """Inside, each of `blocks` is called with the arguments that ``cut(kind, block, args, kwargs)`` makes.

    A compiler that traces the model steps around `cut`; compiled blocks stay as they are.

    Examples
    --------
    >>> from sparse_ref_attn.adapters.depth import blocks_of
    >>> model = nn.ModuleList([nn.Identity(), nn.Identity()])
    >>> (block,) = blocks_of(nn.ModuleDict({"blocks": model}), {"blocks": "single"})[1:]
    >>> with truncate([block], lambda kind, module, args, kwargs: {"input": args[0] + 1}):
    ...     [layer(1) for layer in model]
    [1, 2]
    >>> type(model[1]).__name__
    'Identity'
    """
    cut = torch.compiler.disable(cut)
    modules = [block.module for block in blocks]
    try:
        for block, module in zip(blocks, modules, strict=True):
            block.stack[block.index] = _Later(module, partial(cut, block.kind))
        yield
    finally:
        for block, module in zip(blocks, modules, strict=True):
            block.stack[block.index] = module

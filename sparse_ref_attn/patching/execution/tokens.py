"""Dropped rows leave at the transformer's input, so that every block runs on a shorter sequence."""

from __future__ import annotations

from typing import Any

import torch

from ...adapters.base import Kwargs
from ...adapters.shortened import Shortened
from ...adapters.stream import restored, stream_rows
from ...packing import kept_rows
from ..call import Call, GenerationCall
from ..measuring import listen

__all__ = ["AtInput"]


class AtInput:
    """Runs a call on the rows of its plan: the kept ones, a rival's, or all."""

    alone = False

    def before(self, call: Call) -> Kwargs:
        if isinstance(call, GenerationCall):
            listen(call)
        adapter, layout, plan = call.adapter, call.layout, call.plan
        if plan.selection is not None:
            rows = kept_rows(layout, plan.selection)
            short = adapter.drop(call.kwargs, layout, rows)
        elif plan.reduced is not None:
            short = adapter.replace(call.kwargs, layout, plan.reduced)
            count = stream_rows(adapter, short)
            if layout.generation[0] == 0:
                rows = torch.arange(min(count, layout.rows), device=call.device)
            else:
                rows = torch.arange(layout.rows - count, layout.rows, device=call.device)
        else:
            return call.kwargs
        call.shortened = Shortened(call.kwargs, rows, layout.rows, plan.reduced)
        return short

    def after(self, call: Call, output: Any) -> Any:
        short = call.shortened
        return output if short is None else restored(call.adapter, output, short.rows, call.layout)

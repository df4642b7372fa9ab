"""Blocks that torch compiles anew for each length, and may not run uncompiled: how many lengths they may have."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import IncompatibleError

__all__ = ["Call", "Rows", "StaticBlocks"]


class Rows(NamedTuple):
    """Reference tokens that the blocks of a call see.

    Parameters
    ----------
    kept : int
        From block `first` on.
    first : int
    before : int, optional
        Before it; None where those blocks run uncompiled.
    """

    kept: int
    first: int = 0
    before: int | None = None


Call = tuple[Hashable, ...]
"""What of a call makes graphs besides its reference tokens; whether it records gradients comes first."""

_MADE: dict[tuple[CodeType, int], tuple[dict[tuple[Hashable, Call, int], int], list[CodeType]]] = {}
"""Graphs that each length made, as far as this library saw, and those that torch had then. Torch keeps the graphs of a
function for all models together."""


@dataclass(frozen=True)
class _Group:
    """Blocks of one model that share their graphs.

    Parameters
    ----------
    code, region : CodeType and int
        Under which torch keeps the graphs.
    limit : int, optional
        Of this compilation alone; None: torch's setting.
    like : tuple
        Shapes and types of a block's weights: graphs serve every model that has them.
    blocks : tuple of int
        Their places in the model, as far as they are known.
    """

    code: CodeType
    region: int
    limit: int | None
    like: Hashable
    blocks: tuple[int, ...]

    @property
    def made(self) -> dict[tuple[Hashable, Call, int], int]:
        """Graphs that each length made, of any model whose blocks have this code."""
        made, seen = _MADE.setdefault((self.code, self.region), ({}, []))
        graphs = self._graphs()
        if not any(code is graph for code in seen for graph in graphs):
            made.clear()  # torch._dynamo.reset() took them all
            seen.clear()
        return made

    def note(self, made: dict[tuple[Hashable, Call, int], int]) -> None:
        """Remember what lengths made, and which graphs torch has now."""
        self.made.update(made)
        _MADE[self.code, self.region][1][:] = self._graphs()

    def new(self, rows: Rows, call: Call) -> set[int]:
        """Which of a call's numbers of reference tokens are not known to have a graph."""
        counts = {rows.kept if block >= rows.first else rows.before for block in self.blocks}
        if not self.blocks:
            counts = {rows.kept, rows.before} if rows.first else {rows.kept}
        made = self.made
        return {count for count in counts if count is not None and (self.like, call, count) not in made}

    @property
    def most(self) -> int:
        """Graphs that torch allows."""
        config: Any = torch._dynamo.config
        limit = config.recompile_limit if self.limit is None else self.limit
        return int(min(limit, config.accumulated_recompile_limit))

    def count(self) -> int:
        """Graphs that torch has."""
        return len(self._graphs())

    def _graphs(self) -> list[CodeType]:
        known: Any = torch._C._dynamo.eval_frame
        if self.region >= 0:
            entries = known._get_cache_entries_for_region(self.code, self.region)
        else:
            entries = known._debug_get_cache_entry_list(self.code)
        return [entry.code for entry in entries]


class StaticBlocks:
    """The blocks of a model that are compiled with fullgraph=True for one length each.

    Parameters
    ----------
    module : nn.Module
    blocks : sequence of nn.Module
        In order of execution.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].compile(fullgraph=True, dynamic=False)
    >>> len(StaticBlocks(model, list(model)).groups)
    1
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        place = {id(block): i for i, block in enumerate(blocks)}
        found: dict[tuple[CodeType, int], tuple[Any, nn.Module, list[int]]] = {}
        for each in module.modules():
            context = _static(each)
            code = None if context is None else _code(each)
            if code is not None:
                key = (code, int(getattr(context, "_isolate_recompiles_id", -1)))
                places = found.setdefault(key, (context, each, []))[2]
                places.extend([place[id(each)]] if id(each) in place else [])
        self.groups = [
            _Group(code, region, getattr(context.callback, "_recompile_limit", None), _like(block), tuple(places))
            for (code, region), (context, block, places) in found.items()
        ]

    def __bool__(self) -> bool:
        return bool(self.groups)

    def knows(self, rows: Rows, call: Call) -> bool:
        """Whether a call ran before (see `check`)."""
        return not any(group.new(rows, call) for group in self.groups)

    def check(self, steps: Iterable[Rows], whole: int, call: Call, what: object, remedy: str) -> None:
        """Raise IncompatibleError where calls need more lengths than torch may still compile.

        Parameters
        ----------
        steps : iterable of Rows
            Of the calls that are to run.
        whole : int
            Reference tokens before any is dropped.
        call : tuple
            What else makes graphs.
        what : object
            What makes the lengths, for the message.
        remedy : str
            What to use in its place.
        """
        steps = set(steps)
        for group in self.groups:
            graphs, made = group.count(), group.made
            new = {count for rows in steps for count in group.new(rows, call)}
            each = max([1, *(n for (_, other, _), n in made.items() if other[0] == call[0])])
            unseen = graphs > sum(made.values())  # of calls before the patch, and so perhaps of the whole call
            needed = each * len(new - {whole} if unseen else new)
            if needed and graphs + needed > group.most:
                raise IncompatibleError(
                    "blocks that are compiled with fullgraph=True and dynamic=False run at most "
                    f"{group.most // each} sequence lengths (torch._dynamo.config.recompile_limit; {graphs} of "
                    f"{group.most} graphs are taken, by any model with such blocks), got {len(new)} new ones of "
                    f"{what}. Use {remedy}, or compile with dynamic=None or True"
                )

    @contextlib.contextmanager
    def running(self, rows: Rows, call: Call) -> Iterator[None]:
        """Around a call that runs compiled: notes its lengths, and how many graphs they make."""
        before = [(group, group.count(), group.new(rows, call)) for group in self.groups]
        yield
        for group, graphs, new in before:
            more = group.count() - graphs
            group.note({(group.like, call, count): -(-more // len(new)) for count in new})


def _static(module: nn.Module) -> Any:
    """The context of a module that is compiled anew for each shape, and may not run uncompiled; None of others."""
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        return None
    context: Any = inspect.getclosurevars(compiled).nonlocals.get("self")
    config: Any = torch._dynamo.config
    dynamic = getattr(context, "_dynamic", None)
    static = dynamic is False or (dynamic is None and not config.automatic_dynamic_shapes)
    return context if static and getattr(context, "fullgraph", False) else None


def _code(module: nn.Module) -> CodeType | None:
    """The code that torch compiles for a module."""
    forward = module.forward
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _like(module: nn.Module) -> Hashable:
    """Names, shapes and types of a module's weights."""
    return tuple((name, tuple(x.shape), x.dtype) for name, x in module.named_parameters())

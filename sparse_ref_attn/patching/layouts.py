"""Where the tokens of a call lie, looked up once a run and shape."""

from __future__ import annotations

from collections.abc import Callable

from ..adapters.base import Adapter, Found, Kwargs
from ..adapters.stream import stream_rows
from ..types import TokenLayout

__all__ = ["Layouts"]


class Layouts:
    """The layouts of one patched transformer's calls.

    Parameters
    ----------
    adapter : Adapter
    unknown : callable
        Told, in words, of a call whose layout is not known.
    """

    def __init__(self, adapter: Adapter, unknown: Callable[[str], None]) -> None:
        self._adapter, self._unknown = adapter, unknown
        self._run: object = None
        self._known: dict[object, Found | None] = {}

    def of(self, kwargs: Kwargs, run: object = None) -> TokenLayout | None:
        """The layout of a call; None where it is not known. Without the identity of a run it is looked up anew."""
        adapter = self._adapter
        x = kwargs.get(adapter.tokens)
        if x is None or x.ndim != 3:
            return self._unknown(f"{adapter.tokens!r} is missing or not (B, rows, D)")
        if run is None or run is not self._run:
            self._run, self._known = run, {}
        rows = stream_rows(adapter, kwargs)
        key = (x.shape[1], rows, adapter.layout_key(kwargs))
        if key not in self._known:
            self._known[key] = adapter.find(kwargs)
        found = self._known[key]
        if found is None:
            return self._unknown(f"{rows} rows that the {adapter.name} adapter cannot tell apart")
        return adapter.layout(kwargs, found)

"""One progress bar for several pipelines that run side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["NoBar", "SequentialBar", "SharedBar"]


class SharedBar:
    """As far as the part that is furthest on, out of the longest part.

    Parameters
    ----------
    make : callable
        ``make(total=...)`` is a bar such as tqdm's; called when the first part begins.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._bar: Any = None
        self._done = 0

    def part(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> _Part:
        """What stands in for one pipeline's ``progress_bar``."""
        if total is None:
            total = len(iterable) if hasattr(iterable, "__len__") else 0  # type: ignore[arg-type]
        if self._bar is None:
            self._bar = self._make(total=total)
        elif total > (self._bar.total or 0):
            self._bar.total = total
            self._bar.refresh()
        return _Part(self, iterable)

    def reach(self, steps: int) -> None:
        """A part has done `steps` of its steps."""
        if steps > self._done:
            self._bar.update(steps - self._done)
            self._done = steps

    def close(self) -> None:
        """The run is over."""
        if self._bar is not None:
            self._bar.close()


class NoBar:
    """In place of a bar where nobody has one to show."""

    def __init__(self, total: int) -> None:
        self.total = total

    def set_description(self, text: str) -> None: ...

    def update(self, steps: int) -> None: ...

    def refresh(self) -> None: ...

    def close(self) -> None: ...


class _Part:
    def __init__(self, shared: SharedBar, iterable: Iterable[Any] | None) -> None:
        self._shared, self._iterable, self._done = shared, iterable, 0

    def update(self, steps: int = 1) -> None:
        self._done += steps
        self._shared.reach(self._done)

    def __iter__(self) -> Iterator[Any]:
        for entry in self._iterable or ():
            yield entry
            self.update()

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        """Whatever else a bar can do (set_description, ...) is done to the shared one."""
        return getattr(self._shared._bar, name)


class SequentialBar(SharedBar):
    """Parts that run one after another and add up to `total` steps.

    Parameters
    ----------
    make : callable
        As in `SharedBar`.
    total : int
    """

    def __init__(self, make: Callable[..., Any], total: int) -> None:
        super().__init__(make)
        self._total, self._before = total, 0

    def part(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> _Part:
        """The next part; whatever it says it has in all."""
        self._before = self._done
        return _Part(self, iterable)

    def reach(self, steps: int) -> None:
        """The part that runs has done `steps` of its steps."""
        super().reach(self._before + steps)

    def say(self, text: str) -> None:
        """What runs now; the first time the bar is drawn."""
        if self._bar is None:
            self._bar = self._make(total=self._total)
        self._bar.set_description(text)

    def fewer(self, steps: int) -> None:
        """So many steps will not run."""
        self._total -= steps
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.refresh()

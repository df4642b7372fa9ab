"""One model in memory, one run at a time: edits in turn, dense runs beside them, and the way back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import ConfigError, SparseRefError
from ..eval.clock import time_call, timed_sites
from ..eval.comparison import Comparison
from ..eval.outputs import table_rows
from ..models import adapter_for
from ..patching import PatchHandle, patch
from ..report.work import dense_flops, recorded_flops
from .edit import Edit
from .model import SMALL, Model, StoppedError

__all__ = ["Made", "Session"]

Told = Callable[[str, int, int], None]
"""Hears what runs, how many of its steps are done, and of how many."""


@dataclass(frozen=True)
class Made:
    """What an edit made.

    Parameters
    ----------
    edit : Edit
    model : Model
        It ran on.
    result : Comparison
        Its `dense_image` is None until `Session.dense` has run.
    memory : (str, str), optional
        Of what, and how much at most, in words.
    first : bool
        Whether it was the model's first run, whose times have warming up in them.
    """

    edit: Edit
    model: Model
    result: Comparison
    memory: tuple[str, str] | None
    first: bool

    def overlay(self) -> Any:
        """The photos with the tokens that were read bright, as a PIL image; None where a rule chose none of them."""
        try:
            return self.result.handle.overlay()
        except SparseRefError:
            return None

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The numbers in words, the head first: what, dense, sparse, gain."""
        rows = table_rows(self.result)
        stored = self.result.handle.record.dense_cache_bytes
        if stored:
            most = max(step.cache_bytes for step in self.result.handle.record.steps)
            rows.append(("stored keys and values", "", f"{most / 1e6:,.3g} MB", ""))
        if self.memory:
            where, held = self.memory
            rows.append((f"memory {where}, at most", "", held, ""))
        return rows

    def notes(self) -> list[str]:
        """What the library decided on its own, and what to know of the times."""
        found = list(self.result.handle.record.notes)
        if self.first:
            found.append("the first run of a model warms up: its time is too long; edit again to compare times")
        return found


class Session:
    """The model that a page shows, and what may be done with it. Every verb waits until the one before is done.

    Examples
    --------
    >>> session = Session()
    >>> session.load()
    >>> session.status()
    'The small trained model is loaded on cpu, as it is: no patch.'
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._handle: PatchHandle | None = None
        self._patched_for = ""
        self._ran = False
        self.model: Model | None = None

    @property
    def patched(self) -> bool:
        """Whether the model is patched now."""
        return self._handle is not None

    def status(self) -> str:
        """In one sentence, which model is loaded and whether it is patched."""
        if self.model is None:
            return "No model is loaded."
        name = "The small trained model" if self.model.small else self.model.name
        patched = f"patched with {self._patched_for}" if self.patched else "as it is: no patch"
        return f"{name} is loaded on {self.model.device}, {patched}."

    def load(self, name: str = SMALL, **settings: Any) -> None:
        """Load a model in place of the one before, which leaves the memory first.

        Parameters
        ----------
        name, **settings
            As `Model.load`.

        Raises
        ------
        ConfigError, UnsupportedModelError, VersionError
            As `Model.load`; a name that is plainly wrong leaves the model that there is.
        """
        Model.check(name)
        with self._turn:
            self._undo()
            if self.model is not None:
                self.model.unload()
            self.model, self._ran = None, False
            self.model = Model.load(name, **settings)

    def run(self, edit: Edit, told: Told = lambda what, step, steps: None) -> Made:
        """Edit on the tokens that the rule keeps; the model stays patched until the next run or `undo`.

        Raises
        ------
        SparseRefError
            If the model does not take the edit. The model is then as it was.
        StoppedError
            If `stop` was called.
        """
        with self._running() as model:
            arguments = model.arguments(edit)
            steps = arguments["num_inference_steps"]
            config = edit.config(model.transformer, steps)
            call = model.caller(arguments, edit.seed, self._listener("sparse", told))
            transformer = model.transformer
            self._handle, self._patched_for = patch(model.pipe, config), edit.words
            image, times = time_call(lambda: call(steps), transformer, ())
            adapter, record = adapter_for(transformer), self._handle.record
            shape = adapter.shape(transformer) if adapter.streams else None
            work = (None, None) if shape is None else (recorded_flops(shape, record), dense_flops(shape, record))
            first, self._ran = not self._ran, True
            return Made(edit, model, Comparison(self._handle, image, None, (times,), (), *work), _memory(), first)

    def dense(self, made: Made, told: Told = lambda what, step, steps: None) -> Made:
        """The same edit with every token, beside what was made; takes the patch off.

        Raises
        ------
        ConfigError
            If another model was loaded since.
        StoppedError
            If `stop` was called.
        """
        with self._running() as model:
            if made.model is not model:
                raise ConfigError("the dense run must be on the model that made the picture, got another: edit again")
            self._undo()
            arguments = model.arguments(made.edit)
            call = model.caller(arguments, made.edit.seed, self._listener("dense", told))
            transformer = model.transformer
            sites = timed_sites(adapter_for(transformer), transformer)
            image, times = time_call(lambda: call(arguments["num_inference_steps"]), transformer, sites)
            return replace(made, result=replace(made.result, dense_image=image, dense_times=(times,)))

    def undo(self) -> None:
        """Take the patch off: the pipeline is bit for bit what it was."""
        with self._turn:
            self._undo()

    def stop(self) -> None:
        """End the run that goes on, after its step."""
        self._stop.set()

    def _undo(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _listener(self, what: str, told: Told) -> Callable[[int, int], None]:
        def done(step: int, steps: int) -> None:
            if self._stop.is_set():
                raise StoppedError
            told(what, step, steps)

        return done

    @contextmanager
    def _running(self) -> Iterator[Model]:
        """One run; what breaks it off leaves the model unpatched."""
        with self._turn:
            if self.model is None:
                raise ConfigError("there must be a model: load one first")
            self._stop.clear()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            try:
                yield self.model
            except BaseException:
                self._undo()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                raise


def _memory() -> tuple[str, str] | None:
    """The most that the run, or where there is no card this process, has held."""
    if torch.cuda.is_available():
        return "on the card", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return "of this process", f"{unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9:.1f} GB"

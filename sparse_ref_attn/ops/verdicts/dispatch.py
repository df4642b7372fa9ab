"""What "auto" goes by: the verdict of this device, got when it is first needed, or before.

On a CPU "auto" is fixed, so that results do not depend on a stopwatch: it takes the first that can. A backend there
that a compiler made is compared with float64 once a process (`fault_of`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from typing import Any, TypeVar

import torch

from .judge import Verdict, fault, judge
from .kind import Kind
from .store import known, lookup, remember

__all__ = ["JUDGED", "fault_of", "order_of", "prepare", "trial_of", "verdict_of"]

logger = logging.getLogger("sparse_ref_attn")

JUDGED: set[str] = {"cuda"}
"""Types of device on which "auto" goes by a verdict."""
TRIALS = {
    "gather_attention": "..gather_attention.trial",
    "attention_mass": "..attention_mass.trial",
    "pack_rows": "..pack_rows.trial",
}
_LOCK = threading.RLock()
Found = TypeVar("Found")
_SAID: set[tuple[str, str]] = set()


def order_of(kind: Kind, safe: tuple[str, ...], measure: bool = True) -> tuple[str, ...]:
    """The backends to try for a call of this kind, in order.

    Parameters
    ----------
    kind : Kind
    safe : tuple of str
        What needs no proof: taken on devices that are not judged, and where nothing can be measured now (a graph is
        being captured, or traced) and no verdict of a neighbouring size is known.
    measure : bool
        Whether a verdict that is not known may be got now.
    """
    if kind.device.type not in JUDGED:
        return safe
    verdict = lookup(kind)
    if verdict is None and measure and _can_measure(kind.device):
        verdict = verdict_of(kind)
    if verdict is None:
        verdict = _nearest(kind)
    return safe if verdict is None else verdict.order


def prepare(kinds: Iterable[Kind]) -> None:
    """Get the verdicts that are missing, before blocks run: compiled ones and captured graphs then find them fixed."""
    for kind in kinds:
        if kind.device.type in JUDGED and _can_measure(kind.device):
            verdict_of(kind)


def verdict_of(kind: Kind, again: bool = False) -> Verdict:
    """The verdict of a kind: the known one, or (also `again`) one got now and kept."""
    with _LOCK:
        verdict = None if again else lookup(kind)
        if verdict is None:
            verdict = _apart(kind.device, partial(judge, kind, trial_of(kind.op)))
            if kind.device.type in JUDGED:
                remember(kind, verdict)
        for name, why in verdict.unusable.items():
            if (kind.op, name) not in _SAID:
                _SAID.add((kind.op, name))
                logger.warning(
                    "%s by %s is unusable on this device and will not be used (%s): %s", kind.op, name, kind.name, why
                )
    return verdict


@cache
def fault_of(kind: Kind, backend: str) -> str:
    """Why a backend must not be used though it can do such a call: where it differs from float64; empty if nowhere.

    Nothing is timed. Asked once a process, by a backend that "auto" takes without a verdict.
    """
    wrong: str = _apart(kind.device, partial(fault, kind, trial_of(kind.op), backend))
    if wrong:
        logger.warning("%s by %s is unusable and will not be used: %s", kind.op, backend, wrong)
    return wrong


def _apart(device: torch.device, judgement: Callable[[], Found]) -> Found:
    """Judge in a thread of its own, where nothing of the caller's holds: no autocast, no mode, no dispatch of an op."""

    def run() -> Found:
        if device.type != "cuda":
            return judgement()
        with torch.cuda.device(device):
            return judgement()

    with ThreadPoolExecutor(1, "sparse_ref_attn verdict") as worker:
        return worker.submit(run).result()


def trial_of(op: str) -> Any:
    """The module that says how an op is tried (see `judge.Trial`)."""
    return import_module(TRIALS[op], __package__)


def _can_measure(device: torch.device) -> bool:
    if torch.compiler.is_compiling():
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _nearest(kind: Kind) -> Verdict | None:
    """The verdict of the same kind in the next size."""
    lookup(kind)
    alike = [(other, verdict) for other, verdict in known().items() if other.resized(kind.size) == kind]

    def distance(each: tuple[Kind, Verdict]) -> int:
        return sum(abs(a.bit_length() - b.bit_length()) for a, b in zip(each[0].size, kind.size, strict=True))

    return min(alike, key=distance)[1] if alike else None

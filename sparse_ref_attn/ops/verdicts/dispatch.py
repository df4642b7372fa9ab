"""What "auto" goes by: the verdict of this device, got when it is first needed, or before.

On a CPU "auto" is fixed: there is one backend that it may take, and results must not depend on a stopwatch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import torch

from .judge import Verdict, judge
from .kind import Kind
from .store import known, lookup, remember

__all__ = ["JUDGED", "order_of", "prepare", "trial_of", "verdict_of"]

logger = logging.getLogger("sparse_ref_attn")

JUDGED: set[str] = {"cuda"}
"""Types of device on which "auto" goes by a verdict."""
TRIALS = {
    "gather_attention": "..gather_attention.trial",
    "attention_mass": "..attention_mass.trial",
    "pack_rows": "..pack_rows.trial",
}
_LOCK = threading.RLock()
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
            verdict = _apart(kind)
            if kind.device.type in JUDGED:
                remember(kind, verdict)
        for name, why in verdict.unusable.items():
            if (kind.op, name) not in _SAID:
                _SAID.add((kind.op, name))
                logger.warning(
                    "%s by %s is unusable on this device and will not be used (%s): %s", kind.op, name, kind.name, why
                )
    return verdict


def _apart(kind: Kind) -> Verdict:
    """Judge in a thread of its own, where nothing of the caller's holds: no autocast, no mode, no dispatch of an op."""

    def run() -> Verdict:
        if kind.device.type != "cuda":
            return judge(kind, trial_of(kind.op))
        with torch.cuda.device(kind.device):
            return judge(kind, trial_of(kind.op))

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

r"""A verdict: which backends agree with the definition in float64 on a small problem, and which of those is fastest.

A backend agrees when no result is further from float64 than twice the definition in the call's own precision, and one
rounding:

    max |x - truth|  <=  2 max |low - truth| + 2 max |truth + 0.3 - 0.3 - truth|        (flash-attention's rule)

Those that agree are timed in turns on a problem of the call's size class. The fastest is taken; of those within 5 % of
it the one that the op's table names first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import SparseRefError
from .kind import Kind

__all__ = ["TIE", "Compared", "Trial", "Verdict", "fault", "judge", "ranked_by_time"]

TIE = 1.05  # times within this ratio are a tie
ROUNDS = 5
SECONDS = 1.0  # of timing a kind, compilation and the first run of each aside; at least one round

Compared = tuple[str, Tensor, Tensor, Tensor]
"""Name of a result, what the backend gave, the truth in float64, the definition in the call's precision."""


class Verdict(NamedTuple):
    """What was seen.

    Parameters
    ----------
    order : tuple of str
        The backends that agree, the one to take first.
    milliseconds : dict
        Median time of each of them.
    errors : dict
        Largest distance from float64 over what is allowed, of each that ran.
    unusable : dict
        Why a backend that could do the call is never used, in words with the figures.
    unable : dict
        Why another cannot do the call.
    """

    order: tuple[str, ...]
    milliseconds: dict[str, float]
    errors: dict[str, float]
    unusable: dict[str, str]
    unable: dict[str, str]


class Trial(Protocol):
    """What an op gives to be judged: one module an op."""

    def candidates(self, kind: Kind) -> Sequence[str]:
        """Names of the backends, in the order that decides a tie."""

    def against(self, kind: Kind, backend: str) -> list[str]:
        """Why a backend cannot do such a call at all."""

    def small(self, kind: Kind) -> Callable[[str], Iterable[Compared]]:
        """Runs a backend on a small problem."""

    def sized(self, kind: Kind) -> Callable[[str], Callable[[], object]]:
        """From a backend to one run on a problem of the kind's size class."""


def judge(kind: Kind, trial: Trial) -> Verdict:
    """Compare and time the backends of an op for one kind of call."""
    names = list(trial.candidates(kind))
    unable = {name: "; ".join(why) for name in names if (why := trial.against(kind, name))}
    able = [name for name in names if name not in unable]
    errors: dict[str, float] = {}
    unusable: dict[str, str] = {}
    with torch.no_grad(), torch.autocast(kind.device.type, enabled=False):
        run = trial.small(kind)
        for name in able:
            try:
                errors[name], wrong = _agreement(run(name))
            except failures() as error:
                wrong = _raised(error)
            if wrong:
                unusable[name] = wrong
        agreeing = [name for name in able if name not in unusable]
        times = {name: 0.0 for name in agreeing}
        if len(agreeing) > 1:
            times, broken = _times(trial.sized(kind), agreeing, kind.device)
            unusable |= broken
    order = ranked_by_time({name: times[name] for name in agreeing if name in times})
    return Verdict(order, times, errors, unusable, unable)


def fault(kind: Kind, trial: Trial, name: str) -> str:
    """What is wrong with the results of one backend, by the same rule, untimed; empty when it agrees."""
    with torch.no_grad(), torch.autocast(kind.device.type, enabled=False):
        try:
            return _agreement(trial.small(kind)(name))[1]
        except failures() as error:
            return _raised(error)


def ranked_by_time(times: dict[str, float]) -> tuple[str, ...]:
    """Names by their times, the first first; within `TIE` of the fastest the order of the dict decides.

    Examples
    --------
    >>> ranked_by_time({"triton": 1.04, "flash": 1.0, "sdpa": 1.2, "flex": 1.19})
    ('triton', 'flash', 'sdpa', 'flex')
    """
    left, order = dict(times), []
    while left:
        fastest = min(left.values())
        order.append(next(name for name, took in left.items() if took <= TIE * fastest))
        del left[order[-1]]
    return tuple(order)


@cache
def failures() -> tuple[type[BaseException], ...]:
    """What a kernel raises that cannot be compiled or launched, or a package built for another PyTorch."""
    found: list[type[BaseException]] = [
        SparseRefError, RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError, AssertionError,
    ]  # fmt: skip
    try:
        from triton.errors import TritonError
    except ImportError:
        return tuple(found)
    return (*found, TritonError)


def _raised(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _agreement(results: Iterable[Compared]) -> tuple[float, str]:
    """The largest distance over what is allowed, and what is wrong in words."""
    worst, wrong = 0.0, ""
    for name, actual, truth, low in results:
        if actual.shape != truth.shape or bool(actual.isnan().any()):
            return float("inf"), f"{name}: NaN, or a shape other than {tuple(truth.shape)}"
        infinite = truth.isinf()
        if not torch.equal(actual.double()[infinite], truth[infinite]):
            return float("inf"), f"{name}: other infinities than the definition's"
        actual, truth, low = (x[~infinite] for x in (actual, truth, low))
        if not truth.numel():
            continue
        rounded = truth.to(low.dtype)
        slack = 2 * float((rounded + 0.3 - 0.3 - rounded).abs().max())
        error = float((actual.double() - truth).abs().max())
        allowed = 2 * float((low.double() - truth).abs().max()) + slack
        share = error / allowed if allowed else float("inf") if error else 0.0
        if share > worst:
            worst = share
            wrong = f"{name}: error {error:.2e} where {allowed:.2e} is allowed" if share > 1 else ""
    return worst, wrong


def _times(
    prepare: Callable[[str], Callable[[], object]], names: Sequence[str], device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of each, run in turns, and what failed at this size."""
    runs: dict[str, Callable[[], object]] = {}
    broken: dict[str, str] = {}
    for name in names:
        try:
            run = prepare(name)
            run()  # compiles
        except failures() as error:
            broken[name] = _raised(error)
        else:
            runs[name] = run
    took: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            took[name].append(_milliseconds(run, device))
        if time.perf_counter() - began > SECONDS:
            break
    return {name: median(each) for name, each in took.items()}, broken


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)

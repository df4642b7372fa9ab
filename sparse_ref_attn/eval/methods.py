"""The configurations that are compared with each other, each at the same number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import schedules
from ..config import SparseRef
from ..errors import ConfigError
from ..execution import Cache
from ..refresh import Every, Never, Refresh
from ..rivals import Downscale, ToMe
from ..schedules import Pieces
from ..selection import AttentionMass, SubjectMask
from ..selection.names import NAMES
from ..vocabulary import METHODS, RULES, SAME, SCHEDULES, chosen

__all__ = ["METHODS", "RULES", "SCHEDULES", "dense_first", "method_name", "methods", "rule_of"]


def method_name(rule: str, schedule: str = "flat") -> str:
    """The one name of a rule with a schedule.

    Raises
    ------
    ConfigError
        For a rule that is not among `RULES`, or a schedule that is not among `SCHEDULES`.

    Examples
    --------
    >>> method_name("edges"), method_name("ReCAST"), method_name("edges", "falling")
    ('edges', 'ReCAST flat', 'edges falling')
    >>> method_name("ReCAST", "dense-first"), method_name("cache", "rising")  # its first step is dense; it has no ramp
    ('ReCAST flat', 'cache')
    """
    rule, schedule = chosen("a rule", rule, RULES, SAME), chosen("a schedule", schedule, SCHEDULES)
    if rule in ("cache", "tiles") or (schedule == "dense-first" and _measures(rule)):
        schedule = "flat"
    return rule if schedule == "flat" and rule != "ReCAST" else f"{rule} {schedule}"


def rule_of(name: str) -> tuple[str, str]:
    """Rule and schedule of a method's name; a name that is no method's is its own rule.

    Examples
    --------
    >>> rule_of("ReCAST rising"), rule_of("subject mask"), rule_of("dense")
    (('ReCAST', 'rising'), ('subject mask', 'flat'), ('dense', 'flat'))
    """
    return _NAMED.get(name, (name, "flat"))


def methods(
    keep: float,
    names: Sequence[str] = METHODS,
    *,
    seed: int = 0,
    steps: int | None = None,
    mask: Any = None,
) -> dict[str, SparseRef]:
    """Configurations by name that run the same share of the tokens: in each step that drops any, or, of "cache", all
    of them in that share of the steps, between which everything that was stored is read. Of "tiles" too the share is
    that of the steps; between them each tile reads its own eighth of what was stored, and the means of the rest.

    Those that measure the attention run their first step dense, so their mean over a run is higher: compare it too, or
    give the others a dense first step ("random dense-first").

    Parameters
    ----------
    keep : float, in (0, 1]
        Share of each reference's tokens. "rising" goes from two fifths of it to eight fifths over the run, less where
        eight fifths would be more than all, and "falling" the other way; everything else keeps it at every step.
    names : sequence of str
        Of `METHODS`, or made by `method_name`.
    seed : int
        Of what is drawn at random.
    steps : int, optional
        Of the run: a ramp then has its mean over the steps that drop any, without the dense first one, and the steps
        in which "cache" and "tiles" compute the references lie at equal distances.
    mask : tensor, array or PIL image, optional
        What "subject mask" keeps: see `SubjectMask`.

    Raises
    ------
    ConfigError
        For an unknown name, `keep` outside (0, 1], or "subject mask" without a mask.

    Examples
    --------
    >>> list(methods(0.25, ["downscaled", "edges rising"]))
    ['downscaled', 'edges rising']
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep must lie in (0, 1], got {keep}")
    unknown = [name for name in names if name not in _NAMED]
    if unknown:
        raise ConfigError(
            f"methods must be among {', '.join(METHODS)}, or a rule with one of {', '.join(SCHEDULES[1:])}, "
            f"got {', '.join(unknown)}"
        )
    found = {}
    for name in names:
        rule, schedule = _NAMED[name]
        if rule == "cache":
            found[name] = SparseRef("grid", 1.0, execute=Cache(refresh=_refresh(keep, steps)), seed=seed)
            continue
        if rule == "tiles":
            found[name] = SparseRef("mass", 1 / 8, execute=Cache(refresh=_refresh(keep, steps), per="tile"), seed=seed)
            continue
        budget = _budget(schedule, keep, steps if _measures(rule) else None)
        found[name] = SparseRef(select=_select(rule, mask), budget=budget, seed=seed)
    return found


def dense_first(keep: float) -> Pieces:
    """The share `keep` after a first step with all tokens, which is what a rule that measures attention spends.

    Examples
    --------
    >>> budget = dense_first(0.25)
    >>> [budget.tokens_at(schedules.Clock.uniform(step, 3), 256) for step in range(3)]
    [256.0, 64.0, 64.0]
    """
    return Pieces((1.0, keep), at=(1e-6,))


def _refresh(keep: float, steps: int | None) -> Refresh:
    """The steps that compute the references, `keep` of all."""
    if steps is None:
        return Every(max(1, round(1 / keep)))
    full = max(1, round(keep * steps))
    return Never() if full == 1 else Every(1 if full == steps else 1 / full)


def _select(rule: str, mask: Any) -> Any:
    if rule == "subject mask":
        if mask is None:
            raise ConfigError('"subject mask" must be given the mask of the reference, got none')
        return SubjectMask(mask)
    if rule == "ReCAST":
        return AttentionMass()
    if rule == "mass x values":
        return AttentionMass(value_norm=True)
    return {"downscaled": Downscale(), "ToMe": ToMe()}.get(rule, rule)


def _measures(rule: str) -> bool:
    """Whether the first step is dense anyway."""
    return rule in ("ReCAST", "mass x values") or (rule in NAMES and bool(NAMES[rule]().probes()))


def _budget(schedule: str, keep: float, steps: int | None) -> Any:
    if schedule == "flat":
        return keep
    if schedule == "dense-first":
        return dense_first(keep)
    # Mean progress of the steps that drop: one half, or more where the first of `steps` is dense.
    middle = 0.5 if steps is None or steps < 2 else steps / (2 * (steps - 1))
    swing = min(0.6, (1 / keep - 1) / (2 * middle), 0.9 / (2 * middle))
    if schedule == "rising":
        first, last = keep * (1 - 2 * swing * middle), min(1.0, keep * (1 + 2 * swing * (1 - middle)))
        return schedules.Linear(first, last)
    first, last = min(1.0, keep * (1 + 2 * swing * middle)), keep * (1 - 2 * swing * (1 - middle))
    return schedules.Descending(first, last, gamma=1.0)


_NAMED = {method_name(rule, schedule): (rule, schedule) for schedule in reversed(SCHEDULES) for rule in RULES}

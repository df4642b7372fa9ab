"""Settings by the names of rivals: fewer steps, step caches, and a rule together with one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..config import SparseRef
from ..errors import ConfigError
from ..execution import Cache
from ..refresh import Never
from ..vocabulary import COMBINED, FEWER, RIVALS, chosen
from .methods import method_name
from .settings import Setting
from .step_caches import StepCache

__all__ = ["is_rival", "rival_setting"]


def is_rival(name: str) -> bool:
    """Whether a name is of `vocabulary.RIVALS` or `vocabulary.COMBINED`, and so of no `SparseRef` alone."""
    return name in RIVALS or name in COMBINED


def rival_setting(name: str, keep: float, steps: int, member: Callable[[str, int], SparseRef]) -> Setting:
    """The setting of a rival at a share.

    "fewer steps" runs that share of the steps. A step cache computes about that share of them: the interval of
    TaylorSeer is one over it, the threshold of the others a tenth over it. A rule with "fewer steps" keeps the share in
    half of the steps; a rule with a step cache keeps it beside the cache, "cache" and "tiles" with references that are
    computed once, which is all that a step cache allows.

    Parameters
    ----------
    name : str
        Of `vocabulary.RIVALS` or `vocabulary.COMBINED`.
    keep : float, in (0, 1]
    steps : int
        Of the dense run.
    member : callable of (str, int)
        The configuration of a method in so many steps, at the share.

    Raises
    ------
    ConfigError
        For another name, a share outside (0, 1], or one at which a step cache computes every step.

    Examples
    --------
    >>> from sparse_ref_attn.eval.methods import methods
    >>> member = lambda method, steps: methods(0.25, [method], steps=steps)[method]
    >>> rival_setting("fewer steps", 0.25, 12, member).name, rival_setting("TaylorSeer", 0.25, 12, member).name
    ('3 steps', 'TaylorSeer every 4')
    >>> rival_setting("cache + fewer steps", 0.5, 12, member).steps
    6
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep must lie in (0, 1], got {keep}")
    rule, _, rival = chosen("a rival", name, (*RIVALS, *COMBINED)).rpartition(" + ")
    if rival == FEWER:
        fewer = max(1, steps // 2 if rule else round(keep * steps))
        return Setting(fewer, member(method_name(rule), fewer) if rule else None)
    every = round(1 / keep)
    if every < 2:
        raise ConfigError(f"{rival} must compute some steps and not all, got the share {keep:g}, which is all")
    forecasts = rival.startswith("TaylorSeer")
    cache = StepCache(rival, every=every) if forecasts else StepCache(rival, threshold=round(0.1 / keep, 6))
    config = member(method_name(rule), steps) if rule else None
    if config is not None and isinstance(config.execute, Cache):
        config = replace(config, execute=replace(config.execute, refresh=Never()))
    return Setting(None, config, cache)

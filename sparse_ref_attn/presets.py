"""Configurations by name: three that were chosen on the frontier, and the papers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import schedules, vocabulary
from .candidates import CANDIDATES
from .checks import is_int, is_number
from .config import SparseRef, UniformGuard
from .errors import ConfigError
from .execution import EXECUTIONS, Cache
from .selection import AttentionMass, Edges, Grid, Mix, Saliency, Selector
from .vocabulary import chosen

__all__ = ["CHOSEN", "PRESETS", "Choice", "ReCAST", "SparseContext", "configuration"]


@dataclass(frozen=True)
class Choice:
    """A preset that was chosen on the frontier: the fastest candidate that stays within its bounds.

    Parameters
    ----------
    key : str
        Of `candidates.CANDIDATES`.
    loss_db : float
        Most that the subject may lose in any family of edits: the lower end of the 95 % interval, in dB.
    picture_db : float or None
        Least PSNR of the picture against the dense one in any family, in dB.
    """

    key: str
    loss_db: float
    picture_db: float | None

    def config(self, **settings: Any) -> SparseRef:
        """The configuration, with other values for some fields of `SparseRef`.

        Raises
        ------
        ConfigError
            For a setting that says which tokens are kept, or an execution that stores nothing or a part.
        """
        dropping = [f"{name}={settings[name]!r}" for name in ("task", "select", "budget") if name in settings]
        if "execute" in settings and (way := chosen("execute", settings.pop("execute"), EXECUTIONS)) != "cache":
            dropping.append(f"execute={way!r}")
        if dropping:
            raise ConfigError(
                f"{' and '.join(dropping)} must come with a preset that drops tokens ({', '.join(vocabulary.PAPERS)}): "
                f"{', '.join(CHOSEN)} store every reference token and read all of them"
            )
        own = CANDIDATES[self.key]
        if settings.get("isolated") and "refresh" not in settings and isinstance(own.execute, Cache):
            own = replace(own, execute=replace(own.execute, refresh=None))  # what runs once is never refreshed
        return replace(own, **settings)


CHOSEN: Mapping[str, Choice] = {
    "faithful": Choice("stored-quarters", loss_db=0.3, picture_db=40.0),
    "balanced": Choice("stored-halves", loss_db=1.0, picture_db=30.0),
    "fast": Choice("stored-once", loss_db=2.0, picture_db=None),
}
"""What was chosen; `tests/test_frontier.py` holds it to the rows of ``assets/frontier.csv``.

All three store the references and read all that they stored. "faithful" computes them at quarters of the run (halves of
one of up to eight steps), "balanced" at its halves, "fast" in the first step alone. So they fit any number of steps and
references; where a model's references see neither time nor generation (FLUX.2 Klein-KV) the pipeline itself computes
them once, and all three leave it as it is."""


def ReCAST(  # noqa: N802 -- the paper's name, used like the noun it is
    n_min: int | float = 256,
    n_max: int | float = 1024,
    gamma: float = 2.0,
    *,
    task: str = "auto",
    reference_tokens: int = 4096,
    select: Selector | str | None = None,
    **settings: Any,
) -> SparseRef:
    r"""ReCAST: rank by attention in one dense profiling step, keep more tokens as denoising goes on.

    .. math:: N(t) = N_{\min} + (N_{\max} - N_{\min}) (1 - t/T)^{\gamma}

    Parameters
    ----------
    n_min, n_max : int or float in (0, 1]
        Kept first and last: tokens of a reference of `reference_tokens` (int; paper: 256, 1024 of
        4096), or a share of it (float). Tokens scale with each reference's size, as shares do: a
        reference half as large keeps half.
    gamma : float
        Exponent, > 0 (paper: 2).
    task : {"auto", "edit", "subject", "style"}
        "subject" is the paper as it stands. "auto" and "edit" add `UniformGuard`, because an edit
        of the whole image (a recolour) needs every token. "style" mixes the mass with an even
        grid, because style cues are spread out (the paper's largest loss, its section 3.4).
    reference_tokens : int
        The reference size that `n_min` and `n_max` in tokens are meant for.
    select : Selector, optional
        Default ``AttentionMass(blocks="single")``, eq. (2)-(3) over the single-stream blocks.
    **settings
        Further fields of `SparseRef`.

    Notes
    -----
    Eq. (4) over 28 steps averages 517 of 4,096 tokens on the clock i/(n-1), not the ~600 that the
    paper states, and 654 with the dense profiling step. Of the budget's own steps the first is
    the profiling step, so N(T) itself never runs.

    References
    ----------
    .. [1] Han et al., "ReCAST: Probing Sparse Reference Use in In-Context Image Generation",
       FoGen at ICML 2026, eqs. (2)-(4).

    Raises
    ------
    ConfigError
        If `n_min` or `n_max` is neither, they do not ascend, or one exceeds `reference_tokens`.

    Examples
    --------
    >>> ReCAST().budget
    Polynomial(low=0.0625, high=0.25, gamma=2.0, per='reference')
    >>> ReCAST(0.1, 0.5).budget
    Polynomial(low=0.1, high=0.5, gamma=2.0, per='reference')
    """
    task = chosen("task", task, vocabulary.TASKS)
    if not is_int(reference_tokens, 1):
        raise ConfigError(f"reference_tokens must be an int of at least 1, got {reference_tokens!r}")
    for name, keep in (("n_min", n_min), ("n_max", n_max)):
        schedules.check_keep(name, keep)
    low, high = (keep / reference_tokens if isinstance(keep, int) else keep for keep in (n_min, n_max))
    if not low <= high <= 1:
        given = ", ".join(map(repr, (n_min, n_max, reference_tokens)))
        raise ConfigError(f"n_min <= n_max <= reference_tokens must hold, got {given}")
    if select is None:
        select = AttentionMass()
        if task == "style":
            select = Mix(((select, 0.5), (Grid(), 0.5)))
    settings.setdefault("guard", UniformGuard() if task in ("auto", "edit") else None)
    return SparseRef(select=select, budget=schedules.Polynomial(low, high, gamma), **settings)


def SparseContext(  # noqa: N802
    keep: float | int = 0.10,
    select: Selector | str | None = None,
    *,
    task: str = "edit",
    **settings: Any,
) -> SparseRef:
    """Sparse Context: a fixed share of the tokens, chosen by a rule that fits the task.

    Parameters
    ----------
    keep : float in (0, 1] or int
        Ratio or tokens of each reference (paper: 0.05 and up).
    select : Selector or str, optional
        The rule. Default by task: "edit" ``Edges()``, "subject" ``Saliency()``, "style" ``Grid()``,
        "auto" ``Edges()``. The paper names Canny edges and saliency; which task takes which, and
        the grid, are this library's choice.
    task : {"edit", "subject", "style", "auto"}
        "auto" runs the first step dense to look at the attention, and keeps more where it is near
        uniform (`UniformGuard`).
    **settings
        Further fields of `SparseRef`.

    References
    ----------
    .. [1] "Keep The Essentials: Efficient Reference Conditioned Generation via Token Dropping",
       arXiv 2606.23682.

    Examples
    --------
    >>> SparseContext(0.25, task="subject").select
    Saliency(on_latents='error')
    """
    task = chosen("task", task, vocabulary.TASKS)
    if select is None:
        select = {"edit": Edges, "auto": Edges, "subject": Saliency, "style": Grid}[task]()
    settings.setdefault("guard", UniformGuard() if task == "auto" else None)
    return SparseRef(select=select, budget=keep, **settings)


PRESETS: Mapping[str, Callable[..., SparseRef]] = dict(
    zip(vocabulary.PRESETS, (*(choice.config for choice in CHOSEN.values()), ReCAST, SparseContext), strict=True)
)
"""By name, as the command line has them."""


def configuration(given: SparseRef | float | str | None) -> SparseRef:
    """What is meant by a configuration, the name of a preset, a share or a number of tokens; None is "balanced".

    Parameters
    ----------
    given : SparseRef, str, float, int or None
        A float in (0, 1] or an int is ``SparseContext(given)``: that share of the tokens, or so many, at every step.

    Raises
    ------
    ConfigError
        If it is none of these.

    Examples
    --------
    >>> configuration(None).describe()
    "Grid, Constant(keep=1.0, per='reference'), cache, refreshed Every(n=0.5, warmup=1, last=0)"
    >>> configuration("recast") == ReCAST(), configuration(0.25) == SparseContext(0.25)
    (True, True)
    """
    if isinstance(given, SparseRef):
        return given
    if given is None or isinstance(given, str):
        name = vocabulary.DEFAULT_PRESET if given is None else given
        return PRESETS[chosen("a configuration's name", name, PRESETS)]()
    if is_number(given):
        return SparseContext(given)
    raise ConfigError(
        "config must be a SparseRef (ReCAST(...), SparseContext(...)), a preset's name or a share, got "
        f"{type(given).__name__}"
    )

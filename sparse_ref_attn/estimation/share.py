"""The configuration whose run keeps a given share of the reference tokens on average."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..config import SparseRef
from ..errors import ConfigError
from ..hooks.diffusers import AttentionSite
from ..models import adapter_for
from ..patching.execution.joint import check_cache
from ..types import Reference, TokenLayout
from .cache import kept_whole
from .planned import PlannedRun

__all__ = ["at_share", "at_share_of_sites"]

_SIDE = 1000  # of the reference that stands for all: counts of a million tokens are shares to six digits
_LAYOUT = TokenLayout(_SIDE**2 + 1, 0, (0, 1), (Reference(1, _SIDE**2, (_SIDE, _SIDE)),))
_EXACT, _HALVINGS = 1.5e-6, 24


def at_share(transformer: nn.Module, family: Callable[[float], SparseRef], share: float, steps: int) -> SparseRef:
    """The member of a family of configurations that keeps `share` of the reference tokens over a whole run.

    The mean is over all steps and, within a step, over the blocks: a dense profiling step counts as all tokens, as it
    does in `RunRecord` and `Estimate.mean_tokens`. So the steps after it keep less than `share`. Where references are
    stored in full steps, the mean is over the steps between, of the tokens that are read.

    Parameters
    ----------
    transformer : torch.nn.Module
        A supported one, on any device, the meta device included.
    family : callable of float
        The configuration for an amount in (0, 1]: keeps more as it grows, everything at 1.
    share : float, in (0, 1]
        To within rounding to whole tokens. A guard may keep more.
    steps : int
        Of the run.

    Returns
    -------
    SparseRef
        ``family(share)`` where no step keeps more than its budget, all that is stored of references is read, or the
        amount changes no budget (but the steps with reference rows, as of the methods "cache" and "tiles").

    Raises
    ------
    ConfigError
        If the steps and blocks that keep every token are more than `share` by themselves.
    IncompatibleError
        If the configuration asks for a cache and the model's attention is not known.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> from sparse_ref_attn.models import named_model
    >>> model = named_model("kontext", num_layers=2, num_single_layers=2)
    >>> at_share(model, lambda keep: sra.SparseRef("edges", keep), 0.25, steps=4).budget.keep
    0.25
    >>> at_share(model, lambda keep: sra.SparseRef("mass", keep), 0.4, steps=4).budget.keep  # 1 and 3 x 0.2
    0.2
    """
    adapter = adapter_for(transformer)
    check_cache(family(share), adapter, transformer)
    kept_by_model = adapter.cache is not None and adapter.cache.kept_by(transformer)
    before, whole, _ = kept_whole(adapter, transformer, _LAYOUT)
    return at_share_of_sites(adapter.sites(transformer), family, share, steps, kept_by_model, whole, before)


def at_share_of_sites(
    sites: Sequence[AttentionSite],
    family: Callable[[float], SparseRef],
    share: float,
    steps: int,
    kept_by_model: bool = False,
    whole: bool = False,
    before_steps: bool = False,
) -> SparseRef:
    """As `at_share`, of a model that is known by the attention of its blocks alone.

    Parameters
    ----------
    sites : sequence of AttentionSite
        In the order of the blocks.
    kept_by_model : bool
        Whether the model keeps its references' keys and values itself.
    whole, before_steps : bool
        Whether of all tokens, and before the first step.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> blocks = [AttentionSite(None, "double")] * 4
    >>> at_share_of_sites(blocks, lambda keep: sra.SparseRef("mass", keep), 0.4, steps=4).budget.keep
    0.2
    """

    def planned(config: SparseRef) -> PlannedRun:
        return PlannedRun.of(config, sites, _LAYOUT, steps, kept_by_model, whole=whole, before_steps=before_steps)

    def mean(config: SparseRef) -> float:
        return planned(config).mean(_SIDE**2, len(sites)) / _SIDE**2

    if family(share).budget == family(1.0).budget or planned(family(share)).reads_all(_SIDE**2):
        return family(share)
    for exact in (share, 1.0):
        if abs(mean(config := family(exact)) - share) < _EXACT:
            return config
    least = mean(family(1 / _SIDE**2))
    if least > share - _EXACT:
        raise ConfigError(
            f"a share of the tokens must be above what the steps and blocks with every token take, got "
            f"{100 * share:.3g} % where they are {100 * least:.3g} % of {steps} steps: more steps, a larger share, "
            'profile="in_flight" or a rule that measures no attention'
        )
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(family(middle)) < share else (low, middle)
    return family(round(high, 6))

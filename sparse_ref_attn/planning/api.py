"""The setting for a speed, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..candidates import CANDIDATES
from ..checks import is_number
from ..config import SparseRef
from ..errors import ConfigError, IncompatibleError
from ..estimation import Estimate, estimate, estimate_of, token_side
from ..frontier import loss_of, read_points
from ..hooks.compiled import unwrap
from ..models import adapter_for, named_model, published_size
from ..patching import transformer_of
from ..presets import CHOSEN
from ..vocabulary import MODELS, chosen
from .chooser import known, least_loss, within
from .result import FewerSteps, Option, RunPlan

__all__ = ["plan"]

Size = tuple[int, int]
Estimating = Callable[..., Estimate]
SMALL = (
    "losses are those of the small model that ships, whose tasks have one right answer: fewer steps cost more where "
    "much is left open, so compare both on your own edits (sra compare)"
)


def plan(
    pipe: Any,
    speedup: float,
    *,
    references: Sequence[Size] = ((1024, 1024),),
    output: Size = (1024, 1024),
    text_tokens: int = 512,
    steps: int | None = None,
    batch: int = 1,
    calls_per_step: int = 1,
    pixels_per_token: int | None = None,
) -> RunPlan:
    """The candidate that the frontier thinks best for a speed, from sizes alone: nothing is run.

    Parameters
    ----------
    pipe : diffusers pipeline, torch.nn.Module or str
        As for `estimate`, or a published model's name, such as "kontext".
    speedup : float
        Dense work over the run's own that is wanted at least, >= 1.
    references, output, text_tokens, steps, batch, calls_per_step, pixels_per_token
        As for `estimate`.

    Returns
    -------
    RunPlan
        `config` to patch with, `summary()` for people, `to_dict()` for programs. Beside the best candidate it has what
        fewer steps would give, and where no candidate is fast enough both together. Candidates that lose more than the
        preset "fast" may are left out.

    Raises
    ------
    ConfigError
        If `speedup` is no number of at least 1, and as `estimate`. A speed that cannot be had raises none here, but
        where `config` is read.
    UnsupportedModelError, VersionError
        As `estimate`.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> found = sra.plan("kontext", 1.7, steps=28)
    >>> found.best.key, round(found.best.estimate.flop_ratio, 2), found.fewer_steps.steps
    ('stored-thirds', 1.72, 16)
    >>> sra.plan("kontext", 3, steps=28).best is None
    True
    """
    if not is_number(speedup) or not 1 <= speedup < float("inf"):
        raise ConfigError(f"speedup must be dense work over the run's own, at least 1, got {speedup!r}")
    if isinstance(pipe, str):
        size = published_size(chosen("a model's name", pipe, MODELS))
        size.pipeline.check_references(len(references))
        steps = size.pipeline.steps(size.distilled) if steps is None else steps
        pipe = named_model(pipe)

    sizes: dict[str, Any] = {
        "references": references, "output": output, "text_tokens": text_tokens, "batch": batch,
        "calls_per_step": calls_per_step,
    }  # fmt: skip
    dense = estimate(pipe, SparseRef("grid", 1.0), steps=steps, pixels_per_token=pixels_per_token, **sizes)
    steps = len(dense.kinds)
    sizes["pixels_per_token"] = token_side(pipe) if pixels_per_token is None else pixels_per_token
    transformer = unwrap(transformer_of(pipe))
    of = partial(estimate_of, transformer, adapter_for(transformer).shape(transformer), **sizes)
    options, refused = _options(of, steps)
    speeds = {key: option.estimate.flop_ratio for key, option in options.items()}
    best = least_loss(speedup, speeds, {key: option.loss for key, option in options.items()})
    fastest = max(speeds, key=speeds.__getitem__, default=None)
    return RunPlan(
        model=dense.model,
        speedup=speedup,
        steps=steps,
        best=None if best is None else options[best],
        fastest=None if fastest is None else options[fastest],
        fewer_steps=_fewer(speedup, steps),
        together=_together(of, speedup, steps, options) if best is None else None,
        notes=(*refused, SMALL),
    )


def _options(of: Estimating, steps: int) -> tuple[dict[str, Option], list[str]]:
    """The candidates that the model can run and that stay within the bounds of "fast", and why it cannot run others."""
    found, refused = {}, dict[str, None]()
    for key, loss in known(steps).items():
        if not within(loss, CHOSEN["fast"]):
            continue
        try:
            found[key] = Option(key, CANDIDATES[key], of(CANDIDATES[key], steps=steps), loss)
        except IncompatibleError as error:
            refused[f"left out: {error}"] = None
    return found, list(refused)


def _fewer(speedup: float, steps: int) -> FewerSteps | None:
    own = int(steps / speedup + 1e-9)
    return FewerSteps(own, steps / own, loss_of(read_points(), "dense", steps, own)) if 0 < own < steps else None


def _together(of: Estimating, speedup: float, steps: int, options: dict[str, Option]) -> FewerSteps | None:
    """In the most steps; of those that are measured in fewer steps."""
    found = []
    for key, option in options.items():
        if loss_of(read_points(), key, steps, steps - 1) is None:
            continue
        for own in range(steps - 1, 0, -1):
            ratio = of(option.config, steps=own).flop_ratio * steps / own
            if ratio >= speedup:
                found.append(FewerSteps(own, ratio, loss_of(read_points(), key, steps, own), key))
                break
    return max(found, key=lambda fewer: fewer.steps, default=None)

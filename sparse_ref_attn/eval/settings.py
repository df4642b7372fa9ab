"""What a user chooses for one run: how many steps, what is done about the references, and a step cache."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn

from ..checks import is_int
from ..config import SparseRef
from ..cost import ModelShape, StepTokens, step_flops
from ..errors import ConfigError
from ..estimation import Estimate, estimate_of
from ..hooks.diffusers import cached_modules
from ..models import adapter_for
from ..source import source
from .meta_model import meta_transformer
from .setting_words import words_of
from .step_caches import StepCache, step_cached

__all__ = ["Setting"]

SIDE = 1024
"""Pixels of the picture and of each reference at which work is compared."""


@dataclass(frozen=True)
class Setting:
    """One way to make a picture; without arguments the caller's own run, with every token in every step.

    Parameters
    ----------
    steps : int, optional
        Denoising steps, >= 1; None: the caller's own number.
    config : SparseRef, optional
        What the pipeline is patched with; None: every token in every step.
    step_cache : StepCache, optional

    Raises
    ------
    ConfigError
        If `steps` is no number of steps.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> stored = sra.SparseRef("grid", 1.0, execute=sra.Cache())
    >>> Setting(6).name, Setting(6, stored).name, Setting(step_cache=StepCache("TaylorSeer")).name
    ('6 steps', 'stored, 6 steps', 'TaylorSeer every 3')
    >>> print(Setting(6, stored).code)
    sra.patch(pipe, sra.SparseRef("grid", 1.0, execute=sra.Cache()))
    pipe(..., num_inference_steps=6)
    """

    steps: int | None = None
    config: SparseRef | None = None
    step_cache: StepCache | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and not is_int(self.steps, 1):
            raise ConfigError(f"steps must be an int of at least 1, or None, got {self.steps!r}")

    @property
    def name(self) -> str:
        """Short, in words."""
        parts = [] if self.config is None else [words_of(self.config)]
        parts += [] if self.step_cache is None else [self.step_cache.name]
        parts += [] if self.steps is None else [f"{self.steps} steps" if self.steps > 1 else "1 step"]
        return ", ".join(parts) or "dense"

    @property
    def code(self) -> str:
        """What a user copies, a line for each part; empty for the caller's own run."""
        lines = [] if self.config is None else [f"sra.patch(pipe, {source(self.config)})"]
        lines += [] if self.step_cache is None else [self.step_cache.code]
        lines += [] if self.steps is None else [f"pipe(..., num_inference_steps={self.steps})"]
        return "\n".join(lines)

    def flop_ratio(self, base_steps: int, model: str = "kontext", references: int = 1) -> float:
        """Dense work of a run of `base_steps` over the setting's, profiling included, at a published model's sizes.

        Parameters
        ----------
        base_steps : int
            The caller's own.
        model : str
            As for `meta_transformer`.
        references : int
            Of 1024 x 1024 pixels each, as is the output.

        Raises
        ------
        ConfigError
            For a step cache that decides while it runs, whose work is not known before, and as `estimate`.

        Examples
        --------
        >>> round(Setting(6).flop_ratio(12), 2)
        2.0
        >>> round(Setting(step_cache=StepCache("TaylorSeer lite", every=2)).flop_ratio(12), 2)
        1.71
        """
        return _flop_ratio(self, base_steps, model, references)


@cache
def _flop_ratio(setting: Setting, base_steps: int, model: str, references: int) -> float:
    steps = setting.steps or base_steps
    if setting.config is None and setting.step_cache is None:
        return base_steps / steps
    config = SparseRef("grid", 1.0) if setting.config is None else setting.config
    sizes: dict[str, Any] = {"references": [(SIDE, SIDE)] * references, "output": (SIDE, SIDE), "steps": steps}
    found = estimate_of(*_published(model), config, **sizes)
    done = found.sparse.total
    if setting.step_cache is not None:
        done -= _saved(model, found, setting.step_cache)
    return found.dense.total * base_steps / steps / done


@cache
def _published(model: str) -> tuple[nn.Module, ModelShape]:
    """A model without its weights, and its shape."""
    transformer = meta_transformer(model)
    return transformer, adapter_for(transformer).shape(transformer)


def _saved(model: str, run: Estimate, step_cache: StepCache) -> int:
    """FLOPs of a run that its step cache passes over; it begins anew where the number of rows changes."""
    if step_cache.every is None:
        raise ConfigError(f"the work of {step_cache.name} is known after the run alone: it decides while it runs")
    whole, rest = _shapes(model, step_cache.kind)
    saved, since, before = 0, 0, None
    for kind, kept in zip(run.kinds, run.tokens, strict=True):
        reads = kind == "cached"
        rows = StepTokens(run.text, run.generation, 0 if reads else kept, cached=kept if reads else 0)
        measured = kind == "profile"
        since = 0 if rows != before or measured else since + 1
        before = None if measured else rows
        if not step_cache.computes(since):
            saved += step_flops(whole, rows).total - step_flops(rest, rows).total
    return saved


@cache
def _shapes(model: str, kind: str) -> tuple[ModelShape, ModelShape]:
    """The shape of a model, and of what runs in a step that a cache of this kind forecasts."""
    transformer, whole = _published(model)
    part = copy.deepcopy(transformer)
    with step_cached(_Alone(part), StepCache(kind)):
        names = cached_modules(part)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(part.get_submodule(owner), leaf, nn.Identity())
    rest = ModelShape.from_module(
        part, adapter_for(transformer).streams, attention_layers=0, output_rows=whole.output_rows
    )
    return whole, replace(rest, reference_timestep=whole.reference_timestep)


@dataclass(frozen=True)
class _Alone:
    """A transformer where a pipeline is asked for."""

    transformer: Any

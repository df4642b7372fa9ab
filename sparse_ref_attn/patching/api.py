"""The two verbs of the library: `patch` and `patched`."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..adapters.base import Adapter
from ..adapters.classes import full_name
from ..adapters.serving import check_serves
from ..config import SparseRef
from ..errors import ConfigError, UnsupportedModelError
from ..hooks.compiled import check_not_compiled, unwrap
from ..hooks.diffusers import check_diffusers
from ..hooks.instance import check_free
from ..models import adapter_for
from ..presets import configuration
from .generations import Generations
from .handle import PatchHandle
from .patch import Patch

__all__ = ["PURPOSE", "generations_of", "install", "patch", "patch_of", "patched", "resolve", "transformer_of"]

logger = logging.getLogger("sparse_ref_attn")

PURPOSE = "inference"

_PATCHES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Patch]] = weakref.WeakKeyDictionary()


def patch(pipe: Any, config: SparseRef | float | str | None = None, *, adapter: Adapter | None = None) -> PatchHandle:
    """Run a pipeline on the reference tokens that matter.

    Parameters
    ----------
    pipe : diffusers pipeline or torch.nn.Module
        A pipeline with a supported transformer, or the transformer itself.
    config : SparseRef, str, float or int, optional
        "faithful", "balanced" (default) and "fast" store the references' keys and values, computed at quarters of the
        run, at its halves, or once (`presets.CHOSEN`); "recast" and "sparse-context" are ``ReCAST()`` and
        ``SparseContext()``, which drop tokens. A share (0.25) or a number of tokens is that of ``SparseContext``.
    adapter : Adapter, optional
        For a model that is not registered; see `register_adapter`.

    Returns
    -------
    PatchHandle
        `summary()` after a run, `save_overlay(path)`, `remove()`.

    Raises
    ------
    UnsupportedModelError
        If nothing can be patched, or the adapter was not written for such a transformer.
    VersionError
        If diffusers is outside the supported range.
    IncompatibleError
        If the transformer was compiled as a whole, its attention cannot be measured, or what stands beside its weights
        says that they were trained for another execution (``Cache(isolated=...)``).
    ConfigError
        If the configuration does not fit the model, or the adapter is none.

    Notes
    -----
    Only this instance is changed, by torch's own forward hooks, and only while the handle lives on
    it: patching again replaces the patch. Pipelines that share the transformer (``from_pipe``)
    share the patch. Items of a batch share one selection: their scores are averaged. A mask of joint
    attention in the call's attention arguments loses the rows that are dropped; one that is not of the
    call's rows is a LayoutError, one that is no tensor an IncompatibleError. One host sync a run for the
    layout, one to match its references to what the VAE encoded, and one for the ranking; none a step.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> from sparse_ref_attn.eval.embedded import kontext_pipeline
    >>> pipe = kontext_pipeline(size="tiny")
    >>> handle = sra.patch(pipe, sra.SparseContext(0.25, "grid"))
    >>> handle
    PatchHandle(FLUX.1 Kontext: Grid, Constant(keep=0.25, per='reference'), tokens)
    >>> handle.remove()
    """
    config = configuration(config)
    transformer, adapter = resolve(pipe, adapter)
    check_free(transformer, PURPOSE)
    generations = Generations(transformer, None if isinstance(pipe, nn.Module) else pipe, config, adapter)
    state = install(Patch(transformer, adapter, generations, PURPOSE), transformer)
    logger.info("patched %s: %s", adapter.name, config.describe())
    return PatchHandle(generations, transformer, state.remove)


def install(state: Patch, transformer: nn.Module) -> Patch:
    """Put a patch on a transformer, and take off the one that it replaces."""
    replaced = patch_of(transformer)
    state.install()
    if replaced is not None:
        replaced.remove()
    _PATCHES[transformer] = weakref.ref(state)
    return state


def resolve(pipe: Any, adapter: Adapter | None = None) -> tuple[nn.Module, Adapter]:
    """The transformer of a pipeline, or out of its wrappers, and the adapter that serves it.

    Raises
    ------
    UnsupportedModelError, VersionError, IncompatibleError, ConfigError
        As `patch` does.
    """
    model = transformer_of(pipe)
    check_not_compiled(model)
    transformer = unwrap(model)
    check_not_compiled(transformer)
    if adapter is None:
        adapter = adapter_for(transformer)
    elif isinstance(adapter, Adapter):
        check_serves(adapter, transformer)
    else:
        raise ConfigError(f"adapter must be an Adapter, such as PlainAdapter(...), got {adapter!r}")
    if full_name(type(transformer)).startswith("diffusers.") or not isinstance(pipe, nn.Module):
        check_diffusers()
    return transformer, adapter


def transformer_of(pipe: Any) -> nn.Module:
    """The transformer of a pipeline, or the one that is given, in whatever it is wrapped.

    Raises
    ------
    UnsupportedModelError
        If there is none.
    """
    model = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "transformer", None)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"there must be a pipeline with a transformer, or a transformer, got {full_name(type(pipe))}"
        )
    return model


def generations_of(transformer: nn.Module) -> Generations | None:
    """The generations of a transformer that is patched for inference."""
    known = patch_of(transformer)
    return known.planner if known is not None and isinstance(known.planner, Generations) else None


def patch_of(transformer: nn.Module) -> Patch | None:
    """The patch that a transformer has, if any."""
    known = _PATCHES.get(transformer)
    living = None if known is None else known()
    return None if living is None or living.removed else living


@contextlib.contextmanager
def patched(
    pipe: Any, config: SparseRef | float | str | None = None, *, adapter: Adapter | None = None
) -> Iterator[PatchHandle]:
    """As `patch`, taken off at the end of the block, also after an exception.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> from sparse_ref_attn.eval.embedded import kontext_pipeline
    >>> with sra.patched(kontext_pipeline(size="tiny"), sra.SparseContext(0.5, "grid")) as handle:
    ...     handle.config.budget.keep
    0.5
    """
    handle = patch(pipe, config, adapter=adapter)
    try:
        yield handle
    finally:
        handle.remove()

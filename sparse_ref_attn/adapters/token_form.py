"""Transformers that cut latents into tokens themselves: the library gives them tokens, and is given tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..hooks.instance import InstanceHook
from .collate import sample_of, with_sample

__all__ = ["FORM", "token_form_hooks"]

FORM = "token_form"
"""Argument of a call as `Adapter.bind` gives it, in whose place the transformer is given latents again."""

Kwargs = dict[str, Any]


def token_form_hooks(
    transformer: nn.Module,
    name: str,
    latents: Callable[[Tensor, Any], Tensor],
    tokens: Callable[[Tensor, Any], Tensor],
    whole: Callable[[Tensor, Any], Tensor],
    told: Sequence[str] = (),
) -> list[Callable[[], None]]:
    """Hooks, as removers, for calls whose argument `name` is tokens (B, rows, D) and which have a `FORM`.

    They stand inside of the patch's own: what it gives the transformer is tokens, and so is what it gets.

    Parameters
    ----------
    transformer : nn.Module
    name : str
    latents, tokens : callable
        From tokens, kept ones too, and the form to what the transformer takes, and from its output to tokens.
    whole : callable
        From tokens of every row and the form to the output that the caller expects.
    told : sequence of str
        Further arguments of such a call that the transformer does not have.
    """
    here = threading.local()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        here.form = kwargs.get(FORM)
        if here.form is None:
            return None
        given = {key: value for key, value in kwargs.items() if key not in (FORM, *told)}
        return args, {**given, name: latents(given[name], here.form)}

    def inside(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return None if here.form is None else with_sample(output, tokens(sample_of(output), here.form))

    def outside(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        form, here.form = here.form, None
        return None if form is None else with_sample(output, whole(sample_of(output), form))

    return [
        transformer.register_forward_pre_hook(InstanceHook(transformer, before), with_kwargs=True).remove,
        transformer.register_forward_hook(InstanceHook(transformer, inside), prepend=True).remove,
        transformer.register_forward_hook(InstanceHook(transformer, outside)).remove,
    ]

"""The work that a transformer does, counted while it runs: for techniques that skip parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..cost import Flops
from ..hooks.diffusers import AttentionSite, tapped_attention
from ..models import adapter_for

__all__ = ["counted_work", "sites_of"]


@contextmanager
def counted_work(
    transformer: nn.Module, module: nn.Module | None = None, site: int | None = None
) -> Iterator[Callable[[], Flops]]:
    """Inside, every Linear layer and every joint attention that really runs is counted; call what it gives for both.

    A Linear layer whose own output a step cache forecasts counts as run: the output layer of "TaylorSeer lite".

    Parameters
    ----------
    transformer : torch.nn.Module
    module : torch.nn.Module, optional
        Count the Linear layers of this part alone; default all.
    site : int, optional
        Count this attention alone; default all.
    """
    matmul = attention = 0

    def linear(layer: nn.Linear, args: tuple[Any, ...]) -> None:
        nonlocal matmul
        matmul += 2 * args[0].numel() * layer.out_features

    def tap(number: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        nonlocal attention
        attention += 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3]

    layers = [m for m in (module or transformer).modules() if isinstance(m, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(linear) for layer in layers]
    try:
        with tapped_attention(sites_of(transformer, site), tap):
            yield lambda: Flops(matmul, attention)
    finally:
        for hook in hooks:
            hook.remove()


def sites_of(transformer: nn.Module, site: int | None = None) -> Sequence[AttentionSite]:
    """All attentions of the transformer, or the one of that number."""
    sites = adapter_for(transformer).sites(transformer)
    return sites if site is None else sites[site : site + 1]

"""A function that runs a model's layers, as a module that can be patched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ConfigError

__all__ = ["FunctionModel"]


class FunctionModel(nn.Module):
    """A model whose forward nobody calls: a function runs its layers instead (``model_fn`` of DiffSynth-Studio).

    Its call is the function's, so it stands wherever the function stood, and `patch` takes it with an adapter that
    describes the function's arguments.

    Parameters
    ----------
    function : callable
        Takes all that changes from step to step as arguments; what it returns is handed on.
    model : nn.Module
        Whose layers it runs.

    Raises
    ------
    ConfigError
        If `function` is no callable, takes arguments without a name (``*args``), or `model` is no module.

    Examples
    --------
    >>> import torch
    >>> def run(layer, tokens, ref_tokens=None):
    ...     joined = tokens if ref_tokens is None else torch.cat([tokens, ref_tokens], 1)
    ...     return layer(joined)[:, : tokens.shape[1]]
    >>> layer = nn.Linear(4, 4)
    >>> model = FunctionModel(run, layer)
    >>> model(layer, torch.zeros(1, 16, 4), torch.zeros(1, 9, 4)).shape
    torch.Size([1, 16, 4])
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module) -> None:
        super().__init__()
        if not callable(function) or not isinstance(model, nn.Module):
            raise ConfigError(f"a function and the module whose layers it runs are needed, got {function} and {model}")
        self._signature = inspect.signature(function)
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in self._signature.parameters.values()):
            raise ConfigError(f"each argument of the function must have a name, got {self._signature}")
        self.function, self.model = function, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's own call; what stands between hears of all arguments by name."""
        return super().__call__(**self._signature.bind_partial(*args).arguments, **kwargs)

    def forward(self, **kwargs: Any) -> Any:
        return self.function(**kwargs)

"""Witnesses that do not use the library: what a transformer was given and gave, its attention, and masked attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GENERATION = 64  # output tokens of every case at its default side
_ATTEND = torch.nn.functional.scaled_dot_product_attention
LATENT = {"output_type": "latent"}
"""Of a call whose picture nobody looks at, only its transformer's calls."""


@dataclass
class Attention:
    """One attention call: q, k, v (B, S, H, C), and its mask as scaled_dot_product_attention got it, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None

    def weights(self) -> Tensor:
        """The whole softmax (B, H, N, S) in float64."""
        q, k = self.q.double().transpose(1, 2), self.k.double().transpose(1, 2)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.mask is not None:
            bool_mask = self.mask.dtype == torch.bool
            scores = scores.masked_fill(~self.mask, -torch.inf) if bool_mask else scores + self.mask.double()
        return scores.softmax(-1)


@dataclass
class Call:
    """One transformer call: arguments as the pipeline gave them, what reached the model, and the output."""

    given: dict[str, Any]
    reached: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    attention: list[Attention] = field(default_factory=list)

    @property
    def text(self) -> int:
        return self.given["encoder_hidden_states"].shape[1]

    @property
    def rows(self) -> int:
        return self.given["hidden_states"].shape[1]

    @property
    def sample(self) -> Tensor:
        return sample_of(self.output)


def sample_of(output: Any) -> Tensor:
    """What a transformer gave, (B, ...); Z-Image gives a list of pictures."""
    sample = output[0] if isinstance(output, tuple) else output
    return torch.stack(sample) if isinstance(sample, list) else sample


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    """Tensors and dictionaries copied: a pipeline puts other entries into its attention arguments between calls."""
    kinds = {Tensor: Tensor.clone, dict: dict}
    return {name: kinds.get(type(value), lambda same: same)(value) for name, value in values.items()}


class _Listener(TorchFunctionMode):
    """Notes the attention of a call."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTEND:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            q, k, v = (named[name].detach().transpose(1, 2).clone() for name in ("query", "key", "value"))
            self.call.attention.append(Attention(q, k, v, named.get("attn_mask")))
        return func(*args, **kwargs)


@contextmanager
def witnessed(transformer: torch.nn.Module) -> Iterator[list[Call]]:
    """The calls of `transformer` inside, growing. To be entered after patching."""
    calls: list[Call] = []
    listeners: list[_Listener] = []

    def before(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert not args
        calls.append(Call(_copied(kwargs)))
        listeners.append(_Listener(calls[-1]))
        listeners[-1].__enter__()

    def after(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls[-1].reached, calls[-1].output = _copied(kwargs), output

    def ends(*arguments: Any) -> None:
        """Of a call that fails too."""
        listeners.pop().__exit__(None, None, None)

    hooks = [
        transformer.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        transformer.register_forward_hook(after, with_kwargs=True),
        transformer.register_forward_hook(ends, always_call=True),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class HiddenKeys(TorchFunctionMode):
    """Inside, an attention over n keys, from call `first` on, sees only those that ``seen[n]`` allows, (n,) or (B, n)
    bool."""

    def __init__(self, seen: dict[int, Tensor], first: int = 0) -> None:
        super().__init__()
        self.seen, self.first, self.calls = seen, first, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls += 1
            if self.calls <= self.first:
                return func(*args, **kwargs)
            kwargs = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            args, seen = (), self.seen[kwargs["key"].shape[-2]]
            seen = seen.view(-1, 1, 1, seen.shape[-1])
            mask = kwargs.get("attn_mask")
            if mask is not None and mask.dtype != torch.bool:
                kwargs["attn_mask"] = mask.masked_fill(~seen, -torch.inf)
            else:
                kwargs["attn_mask"] = seen if mask is None else mask & seen
        return func(*args, **kwargs)


class KeysOf(TorchFunctionMode):
    """Inside, the last `references` keys and values of each attention are those of an earlier one, in turn; those that
    are not `kept`, (references,) bool, are hidden."""

    def __init__(self, earlier: list[Attention], references: int, kept: Tensor | None = None) -> None:
        super().__init__()
        self.layers, self.references, self.kept = iter(earlier), references, kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            kwargs = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            args, old = (), next(self.layers)
            for name, stored in (("key", old.k), ("value", old.v)):
                own = kwargs[name][:, :, : -self.references]
                kwargs[name] = torch.cat([own, stored[:, -self.references :].transpose(1, 2)], 2)
            if self.kept is not None:
                seen = torch.cat([torch.ones(kwargs["key"].shape[2] - self.references).bool(), self.kept])
                kwargs["key"], kwargs["value"] = (kwargs[name][:, :, seen] for name in ("key", "value"))
                mask = kwargs.get("attn_mask")
                kwargs["attn_mask"] = mask[..., seen] if mask is not None and mask.shape[-1] > 1 else mask
        return func(*args, **kwargs)


def hidden_keys(call: Call, kept: Tensor, references_first: bool = False, from_block: int = 0) -> HiddenKeys:
    """Hides the reference tokens of `call` that are not `kept`, (R,) bool, in every attention from a block on."""
    text, generation = torch.ones(call.text).bool(), torch.ones(GENERATION).bool()
    image = [kept, generation] if references_first else [generation, kept]
    joint = torch.cat([text, *image])
    return HiddenKeys({len(joint): joint, len(kept): kept}, from_block)


def best(scores: np.ndarray, sizes: tuple[int, ...], share: float) -> torch.Tensor:
    """(R,) bool: of each reference the `share` of its tokens with the highest scores, rounded half up."""
    kept, start = np.zeros(sum(sizes), bool), 0
    for size in sizes:
        count = max(1, int(share * size + 0.5 + 1e-9))
        kept[start + np.argsort(-scores[start : start + size])[:count]] = True
        start += size
    return torch.from_numpy(kept)

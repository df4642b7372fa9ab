"""Witnesses that do not use the library: what a transformer was given and gave, its attention, and masked attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

GENERATION = 64  # output tokens of every case at its default side
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


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Attends:
    """Inside, ``torch.nn.functional.scaled_dot_product_attention`` is answered by `attend`, which may ask the one that
    was there before; modes of torch's functions see the call first, as they do without it."""

    def __enter__(self) -> Attends:
        self.ask = functional.scaled_dot_product_attention

        def answer(*args: Any, **kwargs: Any) -> Tensor:
            named = dict(zip(_NAMES, args, strict=False)) | kwargs
            tensors = (named["query"], named["key"], named["value"])
            if has_torch_function(tensors):
                return handle_torch_function(answer, tensors, *args, **kwargs)
            return self.attend(named)

        functional.scaled_dot_product_attention = answer
        return self

    def __exit__(self, *raised: object) -> None:
        functional.scaled_dot_product_attention = self.ask

    def attend(self, given: dict[str, Any]) -> Tensor:
        """`given` are the arguments by their names."""
        raise NotImplementedError


class _Listener(Attends):
    """Notes the attention of the call that is running."""

    call: Call | None = None

    def attend(self, given: dict[str, Any]) -> Tensor:
        if self.call is not None:
            q, k, v = (given[name].detach().transpose(1, 2).clone() for name in ("query", "key", "value"))
            self.call.attention.append(Attention(q, k, v, given.get("attn_mask")))
        return self.ask(**given)


@contextmanager
def witnessed(transformer: torch.nn.Module) -> Iterator[list[Call]]:
    """The calls of `transformer` inside, growing. To be entered after patching."""
    calls: list[Call] = []
    listener = _Listener()

    def before(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert not args
        listener.call = Call(_copied(kwargs))
        calls.append(listener.call)

    def after(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls[-1].reached, calls[-1].output = _copied(kwargs), output
        listener.call = None

    hooks = [
        transformer.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        transformer.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        with listener:
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


class HiddenKeys(Attends):
    """Inside, an attention over n keys, from call `first` on, sees only those that ``seen[n]`` allows, (n,) or (B, n)
    bool."""

    def __init__(self, seen: dict[int, Tensor], first: int = 0) -> None:
        self.seen, self.first, self.calls = seen, first, 0

    def attend(self, given: dict[str, Any]) -> Tensor:
        self.calls += 1
        if self.calls <= self.first:
            return self.ask(**given)
        seen, mask = self.seen[given["key"].shape[-2]], given.get("attn_mask")
        seen = seen.view(-1, 1, 1, seen.shape[-1])
        if mask is not None and mask.dtype != torch.bool:
            seen = mask.masked_fill(~seen, -torch.inf)
        elif mask is not None:
            seen = mask & seen
        return self.ask(**given | {"attn_mask": seen})


class KeysOf(Attends):
    """Inside, the last `references` keys and values of each attention are those of an earlier one, in turn; those that
    are not `kept`, (references,) bool, are hidden."""

    def __init__(self, earlier: list[Attention], references: int, kept: Tensor | None = None) -> None:
        self.layers, self.references, self.kept = iter(earlier), references, kept

    def attend(self, given: dict[str, Any]) -> Tensor:
        old = next(self.layers)
        for name, stored in (("key", old.k), ("value", old.v)):
            own = given[name][:, :, : -self.references]
            given[name] = torch.cat([own, stored[:, -self.references :].transpose(1, 2)], 2)
        if self.kept is not None:
            seen = torch.cat([torch.ones(given["key"].shape[2] - self.references).bool(), self.kept])
            given["key"], given["value"] = (given[name][:, :, seen] for name in ("key", "value"))
            mask = given.get("attn_mask")
            given["attn_mask"] = mask[..., seen] if mask is not None and mask.shape[-1] > 1 else mask
        return self.ask(**given)


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

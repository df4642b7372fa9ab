"""One FLUX.2 training step in which each item keeps references of its own: three items packed through whole blocks.

The rows of the packed batch are ``[all text | all images]``, an item's image rows its noise and then what it keeps of
its reference. FLUX.2 modulates by the timestep alone, and positions come with the tokens, so that only attention must
know where an item ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers.models import attention_dispatch as dispatch
from torch import Tensor, nn

from sparse_ref_attn.functional import gather_attention

from ..builds import made
from ..pipelines import CASES
from .problems import tiling
from .rounded_run import of_run
from .rounding import assert_rounded
from .tolerance import assert_as_accurate

CHANNELS, TEXT_CHANNELS = 16, 48
GRIDS = ((4, 4), (3, 5), (5, 4))  # of each item's picture; its reference is twice as high and wide
TEXTS = (5, 8, 3)
KEPT = (21, 0, 40)  # of the reference's tokens
TIME = 0.5  # the model multiplies it by 1000, exactly in every precision

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Item(NamedTuple):
    """One training example: noisy picture and kept reference tokens, text, their positions, the target velocity."""

    image: Tensor  # (N + K, CHANNELS)
    text: Tensor  # (L, TEXT_CHANNELS)
    image_ids: Tensor  # (N + K, 4)
    text_ids: Tensor  # (L, 4)
    target: Tensor  # (N, CHANNELS)

    def to(self, dtype: torch.dtype) -> Item:
        return Item(*(x.to(dtype) if x.is_floating_point() else x for x in self))


def items() -> list[Item]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def positions(time: int, high: int, wide: int, tokens: int = 1) -> Tensor:
        return torch.cartesian_prod(torch.tensor([time]), *map(torch.arange, (high, wide, tokens)))

    drawn = []
    for (high, wide), length, count in zip(GRIDS, TEXTS, KEPT, strict=True):
        kept = torch.randperm(4 * high * wide, generator=generator)[:count]
        ids = torch.cat([positions(0, high, wide), positions(10, 2 * high, 2 * wide)[kept]])
        text = normal(length, TEXT_CHANNELS)
        drawn.append(
            Item(normal(len(ids), CHANNELS), text, ids, positions(0, 1, 1, length), normal(high * wide, CHANNELS))
        )
    return drawn


def transformer() -> nn.Module:
    model = CASES["klein"].build(layers=1, single=1, heads=2, head_dim=32).transformer
    return model.train().requires_grad_(True)


def dense(texts: Tensor, images: Tensor, backend: str) -> Attention:
    """Each item's queries and its keys are two stretches of rows: texts (1, B + 1), images (1, B + 1)."""
    rows = torch.cat([texts, images])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gather_attention(q[0], k[0], v[0], cu_seqlens_q=rows, cu_seqlens_k=rows, backend=backend)[None]

    return attend


def indexed(texts: Tensor, images: Tensor, backend: str) -> Attention:
    """The same through the gathered loop: every item finds its keys in the packed rows by index, in no order."""
    rows = torch.cat([texts, images])
    generator = torch.Generator().manual_seed(1)
    own = [
        torch.cat([torch.arange(*span) for span in spans]) for spans in zip(*map(pairwise, rows.tolist()), strict=True)
    ]
    shuffled = torch.cat([x[torch.randperm(len(x), generator=generator)] for x in own])
    offsets = tiling((tuple(map(len, own)),))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gather_attention(
            q[0], k_ref=k[0], v_ref=v[0], ref_indices=shuffled, ref_offsets=offsets, cu_seqlens_q=rows, distinct=True,
            backend=backend,
        )[None]  # fmt: skip

    return attend


@contextmanager
def attention(model: nn.Module, attend: Attention) -> Iterator[None]:
    """Inside, every attention of `model` is `attend(q, k, v)` on (1, rows, H, C) after RoPE."""
    member = str.__new__(dispatch.AttentionBackendName, "packed_items")  # unlisted: the public enum stays as it is
    member._name_, member._value_ = "PACKED_ITEMS", "packed_items"
    registry = dispatch._AttentionBackendRegistry

    def backend(query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, **plain: Any) -> Tensor:
        assert attn_mask is None
        return attend(query, key, value)

    registry.register(member)(backend)
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    for processor in processors:
        processor._attention_backend = member
    try:
        yield
    finally:
        for processor in processors:
            del processor._attention_backend
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(member, None)


def predict(model: nn.Module, batch: Sequence[Item]) -> list[Tensor]:
    """Velocities (N, CHANNELS) of the items, as one packed sequence."""
    image, text, image_ids, text_ids, _ = map(torch.cat, zip(*batch, strict=True))
    out = model(
        hidden_states=image[None], encoder_hidden_states=text[None], timestep=torch.tensor([TIME]).to(image),
        img_ids=image_ids, txt_ids=text_ids, return_dict=False,
    )[0][0]  # fmt: skip
    each = out.split([len(item.image) for item in batch])
    return [rows[: len(item.target)] for rows, item in zip(each, batch, strict=True)]


def loss(model: nn.Module, batch: Sequence[Item]) -> Tensor:
    """Sum over the items of their mean squared error."""
    pairs = zip(predict(model, batch), batch, strict=True)
    return torch.stack([(got - item.target).square().mean() for got, item in pairs]).sum()


def gradients(model: nn.Module, *batches: Sequence[Item]) -> dict[str, Tensor]:
    """Of the summed loss in every parameter."""
    model.zero_grad()
    for batch in batches:
        loss(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


Gradients = dict[str, Tensor]


def flat(grads: Gradients, truth: Gradients) -> Tensor:
    """Every parameter counts, in units of its largest gradient."""
    return torch.cat([(grads[name] / x.abs().max().to(grads[name])).flatten() for name, x in truth.items()])


@cache
def one_by_one(dtype: torch.dtype) -> tuple[Gradients, Tensor | None]:
    """The items' gradients in float64, on weights and inputs rounded to `dtype`; what rounding in float32 does to them.

    Only the rotary embedding is float32, as it is in any precision. Computed once for all processes of a run.
    """
    file = "gradients.pt"
    folder = made(f"packed-flux2-{dtype}", lambda folder: torch.save(_one_by_one(dtype), folder / file))
    return torch.load(folder / file)


def _one_by_one(dtype: torch.dtype) -> tuple[Gradients, Tensor | None]:
    model = transformer().to(dtype).to(torch.float64)
    wide = [[item.to(dtype).to(torch.float64)] for item in items()]
    truth = gradients(model, *wide)
    assert all(x.any() for x in truth.values())
    return truth, of_run(lambda: flat(gradients(model, *wide), truth)) if dtype == torch.float32 else None


def check(path: Callable[[Tensor, Tensor, str], Attention], backend: str, dtype: torch.dtype) -> None:
    """Packed gradients err at most twice as much as those of the items one by one, both in `dtype`.

    In float32, at most as random rounding does. One by one is diffusers' own attention.
    """
    batch = [item.to(dtype) for item in items()]
    model = transformer().to(dtype)
    texts = tiling((tuple(len(item.text) for item in batch),))
    images = tiling((tuple(len(item.image) for item in batch),)) + texts[0, -1]
    truth, deviation = one_by_one(dtype)
    with attention(model, path(texts, images, backend)):
        packed = flat(gradients(model, batch), truth)
    if deviation is not None:
        assert_rounded(packed, flat(truth, truth), deviation, "gradients")
    else:
        alone = flat(gradients(model, *([item] for item in batch)), truth)
        assert_as_accurate(packed, flat(truth, truth), alone, "gradients")

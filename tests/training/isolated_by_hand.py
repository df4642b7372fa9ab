"""What isolation means, in plain torch: the model run twice by hand, its attention calls recorded and answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tests.training.batches import Batch, positions


class Attention(TorchFunctionMode):
    """Records keys and values (B, H, S, C) of every attention call, and puts those of `beside` behind its own."""

    def __init__(self, beside: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        super().__init__()
        self._beside, self.seen = list(beside), []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args if args else (kwargs.pop(name) for name in ("query", "key", "value"))
        self.seen.append((k, v))
        mask = kwargs.pop("attn_mask", None)
        if self._beside:
            more_k, more_v = self._beside[len(self.seen) - 1]
            k, v = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(*mask.shape[:-1], more_k.shape[2])], -1)
        return func(q, k, v, attn_mask=mask, **kwargs)


def alone(batch: Batch, rows: Tensor, time: float = 0.0) -> tuple[dict[str, Any], int]:
    """Arguments of a call on `rows` of the image stream by themselves, and its rows of text."""
    given = dict(batch.kwargs)
    text, items = given["encoder_hidden_states"], given["hidden_states"].shape[0]
    given["hidden_states"] = given["hidden_states"][:, rows]
    given["timestep"] = torch.full_like(given["timestep"], time)
    if "guidance" in given:
        given["guidance"] = torch.ones_like(given["guidance"])
    if "img_shapes" in given:
        given |= {"encoder_hidden_states": torch.zeros_like(text[:, :1]), "encoder_hidden_states_mask": None}
        given["img_shapes"] = [[(1, 1, len(rows))]] * items
        return given, 1
    given |= {"encoder_hidden_states": text[:, :0], "txt_ids": given["txt_ids"][:0], "img_ids": given["img_ids"][rows]}
    if "pooled_projections" in given:
        given["pooled_projections"] = torch.zeros_like(given["pooled_projections"])
    return given, 0


def layers_by_hand(model: nn.Module, batch: Batch, per: str, time: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (B, H, R, C) of every reference token in each layer."""
    first, passes = batch.noisy, []
    sizes = batch.sizes if per == "reference" else (sum(batch.sizes),)
    for size in sizes:
        rows = torch.arange(first, first + size)
        kwargs, text = alone(batch, rows, time)
        with positions(model, batch.kwargs, rows), Attention() as heard:
            model(**kwargs)
        passes.append([(k[:, :, text:], v[:, :, text:]) for k, v in heard.seen])
        first += size
    return [
        (torch.cat([k for k, _ in layer], 2), torch.cat([v for _, v in layer], 2))
        for layer in zip(*passes, strict=True)
    ]


def predicted_by_hand(
    model: nn.Module, batch: Batch, per: str, kept: Tensor | None = None, time: float = 0.0
) -> Tensor:
    """The prediction (B, noisy, D) of text and generation that read the reference tokens `kept`, or all."""
    layers = layers_by_hand(model, batch, per, time)
    if kept is not None:
        layers = [(k[:, :, kept], v[:, :, kept]) for k, v in layers]
    rows = torch.arange(batch.noisy)
    with positions(model, batch.kwargs, rows), Attention(layers):
        return batch.only(rows).predict(model)


def gradients_by_hand(
    model: nn.Module, batch: Batch, per: str, kept: Tensor | None = None, time: float = 0.0
) -> dict[str, Tensor]:
    """Of the loss, in every trained parameter."""
    model.zero_grad()
    (predicted_by_hand(model, batch, per, kept, time) - batch.target).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


class RowTimes(nn.Module):
    """A small DiT of text | generation | references whose rows have a time each: one masked call can isolate."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.projections = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor, text: Tensor, times: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, rows, D), text (B, T, D), times (B, rows): of each image row; text has that of the first row."""
        rows = x.shape[1]
        first = times[:, :1].expand(-1, text.shape[1])
        x, times = torch.cat([text, x], 1), torch.cat([first, times], 1)
        for project, out in zip(self.projections, self.outs, strict=True):
            h = functional.layer_norm(x, x.shape[-1:]) * (1 + self.time(times[..., None]))
            q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in project(h).chunk(3, -1))
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + out(attended.transpose(1, 2).flatten(2))
        return x[:, -rows:]

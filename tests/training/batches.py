"""Training batches as trainers make them: noisy tokens, then references; the prediction is sliced to the noisy ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from sparse_ref_attn.types import RefSelection
from tests.copies import copies
from tests.pictures import generator
from tests.pipelines import CASES

MODELS = ("kontext", "klein", "flux2", "qwen_edit_plus", "qwen_edit_plus_2511")
GENERATION = (4, 6)  # grid
REFERENCES = ((6, 4), (3, 5))
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "proj_mlp"]  # of a LoRA, each in one of the models


def build(name: str, **sizes: int) -> nn.Module:
    """The tiny transformer of a case, in training mode."""
    return CASES[name].build(**sizes).transformer.train()


def lora(model: nn.Module, seed: int = 0) -> nn.Module:
    """With a trainable LoRA that changes the output, everything else frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    return model


@copies
def tuned(name: str, **sizes: int) -> nn.Module:
    """The tiny transformer of a case with a LoRA."""
    return lora(build(name, **sizes))


class Batch:
    """One batch of a model: `kwargs` of its call, `noisy` rows to slice the prediction to, the `target` there.

    Parameters
    ----------
    name : str
        Of the model.
    items : int
        Of the batch, B.
    references : sequence of (int, int)
        Grids of the references in tokens.
    seed : int
        Of every number in it.
    """

    def __init__(
        self, name: str, items: int = 2, references: Sequence[tuple[int, int]] = REFERENCES, seed: int = 0
    ) -> None:
        draw = generator(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        grids = [GENERATION, *references]
        self.sizes = tuple(h * w for h, w in references)
        self.noisy, rows, text = GENERATION[0] * GENERATION[1], sum(h * w for h, w in grids), 7
        self.target = normal(items, self.noisy, 16)
        times = torch.linspace(0.2, 0.9, items)
        common = {"hidden_states": normal(items, rows, 16), "timestep": times, "return_dict": False}
        self.kwargs: dict[str, Any] = _ARGUMENTS[name](normal, items, text, grids) | common

    def predict(self, model: Callable[..., Any]) -> Tensor:
        """(B, noisy, 16), as a training script does it."""
        return model(**self.kwargs)[0][:, : self.noisy]

    def loss(self, model: Callable[..., Any]) -> Tensor:
        return (self.predict(model).float() - self.target).square().mean()

    def only(self, rows: Tensor, items: slice = slice(None)) -> Batch:
        """These items with only these image rows, as a run that never saw the others; Qwen inside `positions`."""
        alone = object.__new__(Batch)
        alone.sizes, alone.noisy, alone.target = (), self.noisy, self.target[items]
        alone.kwargs = {
            name: value[items] if name not in ("img_ids", "txt_ids", "return_dict") else value
            for name, value in self.kwargs.items()
        }
        alone.kwargs["hidden_states"] = alone.kwargs["hidden_states"][:, rows]
        if "img_ids" in alone.kwargs:
            alone.kwargs["img_ids"] = self.kwargs["img_ids"][rows]
        else:
            shapes = [(1, *GENERATION), (1, 1, len(rows) - self.noisy)]
            alone.kwargs["img_shapes"] = [shapes] * len(alone.kwargs["img_shapes"])
        return alone


@contextmanager
def positions(model: nn.Module, kwargs: dict[str, Any], rows: Tensor) -> Iterator[None]:
    """Inside, Qwen's image rows have the positions of `rows` of a whole call; other models take theirs from the ids."""
    if "img_shapes" not in kwargs:
        yield
        return
    published = model.pos_embed

    class Placed(nn.Module):
        def forward(self, shapes: Any, **more: Any) -> tuple[Tensor, Tensor]:
            image, text = published(kwargs["img_shapes"], **more)
            return image[rows], text

    model.pos_embed = Placed()
    try:
        yield
    finally:
        model.pos_embed = published


def rows_of(batch: Any, selection: RefSelection) -> Tensor:
    """Generation and kept rows of the image stream."""
    return torch.cat([torch.arange(batch.noisy), batch.noisy + selection.indices])


def gradients_alone(model: nn.Module, batch: Batch, kept: Sequence[RefSelection]) -> dict[str, Tensor]:
    """As `gradients`, of the items (or the whole batch, for one selection) run alone with the rows they kept."""
    model.zero_grad()
    for i, selection in enumerate(kept):
        rows = rows_of(batch, selection)
        item = batch.only(rows, slice(None) if len(kept) == 1 else slice(i, i + 1))
        with positions(model, batch.kwargs, rows):
            (item.loss(model) / len(kept)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def gradients(model: nn.Module, *batches: Batch) -> dict[str, Tensor]:
    """Of the batches' summed losses in every trained parameter."""
    model.zero_grad()
    for batch in batches:
        batch.loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def _grids(frames: Sequence[int], grids: Sequence[tuple[int, int]], *more: Tensor) -> Tensor:
    axes = [(torch.tensor([f]), torch.arange(h), torch.arange(w)) for f, (h, w) in zip(frames, grids, strict=True)]
    return torch.cat([torch.cartesian_prod(*axis, *more) for axis in axes])


def _kontext(normal: Callable[..., Tensor], items: int, text: int, grids: Sequence[tuple[int, int]]) -> dict[str, Any]:
    return {
        "encoder_hidden_states": normal(items, text, 32), "pooled_projections": normal(items, 32),
        "guidance": torch.ones(items), "txt_ids": torch.zeros(text, 3), "img_ids": _grids(range(len(grids)), grids),
    }  # fmt: skip


def _klein(normal: Callable[..., Tensor], items: int, text: int, grids: Sequence[tuple[int, int]]) -> dict[str, Any]:
    zero = torch.tensor([0])
    return {
        "encoder_hidden_states": normal(items, text, 48),
        "txt_ids": torch.cartesian_prod(zero, zero, zero, torch.arange(text)),
        "img_ids": _grids([10 * i for i in range(len(grids))], grids, zero),
    }  # fmt: skip


def _flux2(normal: Callable[..., Tensor], items: int, text: int, grids: Sequence[tuple[int, int]]) -> dict[str, Any]:
    return _klein(normal, items, text, grids) | {"guidance": torch.ones(items)}


def _qwen(normal: Callable[..., Tensor], items: int, text: int, grids: Sequence[tuple[int, int]]) -> dict[str, Any]:
    mask = torch.ones(items, text, dtype=torch.bool)
    mask[-1, -2:] = False
    return {
        "encoder_hidden_states": normal(items, text, 16), "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, *grid) for grid in grids]] * items,
    }  # fmt: skip


_ARGUMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "kontext": _kontext,
    "klein": _klein,
    "flux2": _flux2,
    "qwen_edit_plus": _qwen,
    "qwen_edit_plus_2511": _qwen,
}

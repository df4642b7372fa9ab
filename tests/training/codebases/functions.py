"""Training steps of DiffSynth-Studio: one item, a time with its weight, and models that functions run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.training.codebases.calls import NOISY, SHAPES, TEXT, Batch, Step, _grid
from tests.training.codebases.models import tokens_of

WEIGHT = 0.7  # that the scheduler gives this time


def _loss(prediction: Tensor, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(prediction.float(), batch.target.float()) * WEIGHT


def diffsynth_flux(checkpointing: bool = False) -> Step:
    """``model_fn_flux_image`` with Kontext's pictures, all of frame 1."""
    batch = Batch(4, 32, items=1)
    kwargs = {
        "latents": batch.noisy, "timestep": batch.times, "prompt_emb": batch.prompts,
        "pooled_prompt_emb": batch.pooled, "guidance": torch.tensor([1.0]), "text_ids": torch.zeros(1, TEXT, 3),
        "image_ids": _grid(0, NOISY[0] // 2, NOISY[1] // 2)[None].float(),
        "kontext_latents": torch.cat([tokens_of(x) for x in batch.references], 1),
        "kontext_image_ids": torch.cat([_grid(1, h // 2, w // 2) for h, w in SHAPES])[None].float(),
        "use_gradient_checkpointing": checkpointing, "height": 8 * NOISY[0], "tiled": False,
    }  # fmt: skip
    rows, noisy = {"kontext_latents": 1, "kontext_image_ids": 1}, NOISY[0] * NOISY[1] // 4
    return Step(kwargs, rows, noisy, batch.references, lambda out: _loss(out, batch), apart=True)


def diffsynth_flux2(checkpointing: bool = False) -> Step:
    """What ``model_fn_flux2`` calls the model with."""
    batch = Batch(16, 48, items=1)
    pictures = [batch.noisy, *batch.references]
    ids = [_grid(10 * i, *x.shape[2:], 1)[None] for i, x in enumerate(pictures)]
    noisy = NOISY[0] * NOISY[1]
    kwargs = {
        "hidden_states": torch.cat([x.flatten(2).transpose(1, 2) for x in pictures], 1), "timestep": batch.times / 1000,
        "guidance": torch.tensor([1.0]), "encoder_hidden_states": batch.prompts,
        "txt_ids": _grid(0, 1, 1, TEXT)[None], "img_ids": torch.cat(ids, 1), "kv_cache": None,
        "use_gradient_checkpointing": checkpointing, "use_gradient_checkpointing_offload": False,
    }  # fmt: skip

    def loss(output: Tensor) -> Tensor:
        return _loss(output[:, :noisy].transpose(1, 2).unflatten(2, NOISY), batch)

    return Step(kwargs, {"hidden_states": 1, "img_ids": 1}, noisy, batch.references, loss)


class _InsideStep(Step):
    """References are pictures, and become tokens inside the function."""

    @property
    def count(self) -> int:
        return sum(x.shape[2] * x.shape[3] // 4 for x in self.references)

    def by_hand(self, kept: Tensor) -> dict[str, Any]:
        return self.kwargs | {"by_hand": torch.cat([torch.arange(self.noisy), self.noisy + kept])}


def diffsynth_qwen_step(zero_cond_t: bool, checkpointing: bool = False, several: bool = True) -> Step:
    """``model_fn_qwen_image`` with a list of pictures, or with one picture that is no list."""
    batch = Batch(4, 16, SHAPES if several else SHAPES[:1], items=1)
    kwargs = {
        "latents": batch.noisy, "timestep": batch.times, "prompt_emb": batch.prompts,
        "prompt_emb_mask": torch.ones(1, TEXT, dtype=torch.int64), "height": 8 * NOISY[0], "width": 8 * NOISY[1],
        "edit_latents": batch.references if several else batch.references[0], "zero_cond_t": zero_cond_t,
        "use_gradient_checkpointing": checkpointing, "progress_id": 0,
    }  # fmt: skip
    return _InsideStep(kwargs, {}, NOISY[0] * NOISY[1] // 4, batch.references, lambda out: _loss(out, batch))

"""One training step of each trainer: its packing, ids, times, guidance, slicing and loss, as its source builds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import BriaFiboEditPipeline, Flux2Pipeline, FluxKontextPipeline, QwenImageEditPlusPipeline
from torch import Tensor, nn

from tests.pictures import generator
from tests.training.codebases.models import latents_of, tokens_of

ITEMS = 2
NOISY = (8, 12)  # height and width of latents
SHAPES = ((12, 8), (6, 10))  # of the references
TEXT = 7


@dataclass
class Step:
    """What a trainer calls its model with, and what it makes of the output.

    Attributes
    ----------
    kwargs : dict
        The call.
    rows : dict of str to int
        Arguments with a row for each token, and the axis of these.
    noisy : int
        Rows of the prediction.
    references : list of Tensor
        Latents of the references, whose gradients are looked at.
    loss : callable
        Of the output.
    apart : bool
        Whether `rows` are of the references alone.
    """

    kwargs: dict[str, Any]
    rows: dict[str, int]
    noisy: int
    references: list[Tensor]
    loss: Callable[[Any], Tensor]
    apart: bool = field(default=False, kw_only=True)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each reference, of 2 x 2 pixels, or of one where the model's are."""
        pixels = sum(x.shape[-1] * x.shape[-2] for x in self.references)
        each = pixels // self.count
        return tuple(x.shape[-1] * x.shape[-2] // each for x in self.references)

    @property
    def count(self) -> int:
        """Rows of the references."""
        name, axis = next(iter(self.rows.items()))
        return self.kwargs[name].shape[axis] - (0 if self.apart else self.noisy)

    def by_hand(self, kept: Tensor) -> dict[str, Any]:
        """The call of a trainer that took these reference tokens, and no others, from the first."""
        rows = kept if self.apart else torch.cat([torch.arange(self.noisy), self.noisy + kept])
        return self.kwargs | {name: self.kwargs[name].index_select(axis, rows) for name, axis in self.rows.items()}


class Batch:
    """Latents of the target and the references, noise, times and prompts of one batch.

    `channels` are those of the latents: 4 where the model packs 2 x 2 of them into a token, 16 where it packs none.
    """

    def __init__(
        self, channels: int, width: int, shapes: Sequence[tuple[int, int]] = SHAPES, items: int = ITEMS, seed: int = 0
    ) -> None:
        self._draw = generator(seed)
        self.latents, self.noise = self.normal(items, channels, *NOISY), self.normal(items, channels, *NOISY)
        self.references = [self.normal(items, channels, *shape).requires_grad_() for shape in shapes]
        self.times = torch.linspace(200.0, 900.0, items)  # of 1000
        sigmas = (self.times / 1000)[:, None, None, None]
        self.noisy = (1 - sigmas) * self.latents + sigmas * self.noise
        self.target = self.noise - self.latents
        self.prompts, self.pooled = self.normal(items, TEXT, width), self.normal(items, 32)
        self.masks = torch.ones(items, TEXT, dtype=torch.int64)
        self.masks[-1, -2:] = 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._draw)


def _per_item(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean of each item's mean squared error."""
    return (prediction.float() - target.float()).square().reshape(len(target), -1).mean(1).mean()


def _grid(frame: int, height: int, width: int, *more: int, top: int = 0, left: int = 0) -> Tensor:
    axes = [torch.tensor([frame]), top + torch.arange(height), left + torch.arange(width)]
    return torch.cartesian_prod(*axes, *(torch.arange(n) for n in more))


def _times_by_token(times: Tensor, noisy: int, references: int) -> Tensor:
    """SimpleTuner gives references the time 0."""
    return torch.cat([times[:, None].expand(-1, noisy), times.new_zeros(len(times), references)], 1)


def diffusers_kontext() -> Step:
    """``train_dreambooth_lora_flux_kontext.py``."""
    batch = Batch(4, 32, SHAPES[:1])
    pack, ids = FluxKontextPipeline._pack_latents, FluxKontextPipeline._prepare_latent_image_ids
    noisy = pack(batch.noisy, *batch.noisy.shape)
    condition = batch.references[0]
    own = ids(ITEMS, NOISY[0] // 2, NOISY[1] // 2, "cpu", torch.float32)
    theirs = ids(ITEMS, condition.shape[2] // 2, condition.shape[3] // 2, "cpu", torch.float32)
    theirs[..., 0] = 1
    kwargs = {
        "hidden_states": torch.cat([noisy, pack(condition, *condition.shape)], 1), "timestep": batch.times / 1000,
        "guidance": torch.tensor([1.0]).expand(ITEMS), "pooled_projections": batch.pooled,
        "encoder_hidden_states": batch.prompts, "txt_ids": torch.zeros(TEXT, 3), "img_ids": torch.cat([own, theirs]),
        "return_dict": False,
    }  # fmt: skip

    def loss(output: Any) -> Tensor:
        prediction = FluxKontextPipeline._unpack_latents(output[0][:, : noisy.shape[1]], 8 * NOISY[0], 8 * NOISY[1], 8)
        return _per_item(prediction, batch.target)

    return Step(kwargs, {"hidden_states": 1, "img_ids": 0}, noisy.shape[1], batch.references, loss)


def diffusers_flux2(guidance: bool = True) -> Step:
    """``train_dreambooth_lora_flux2_img2img.py``, and with Klein's, which may have no guidance.

    Each item's reference gets a frame of its own there: 10, 20, ...
    """
    batch = Batch(16, 48, SHAPES[:1])
    (reference,) = batch.references
    noisy, own = Flux2Pipeline._pack_latents(batch.noisy), Flux2Pipeline._prepare_latent_ids(batch.noisy)
    theirs = Flux2Pipeline._prepare_image_ids([reference[i : i + 1] for i in range(ITEMS)]).view(ITEMS, -1, 4)
    kwargs = {
        "hidden_states": torch.cat([noisy, Flux2Pipeline._pack_latents(reference)], 1), "timestep": batch.times / 1000,
        "guidance": torch.full([1], 3.5).expand(ITEMS) if guidance else None, "encoder_hidden_states": batch.prompts,
        "txt_ids": Flux2Pipeline._prepare_text_ids(batch.prompts), "img_ids": torch.cat([own, theirs], 1),
        "return_dict": False,
    }  # fmt: skip

    def loss(output: Any) -> Tensor:
        prediction = Flux2Pipeline._unpack_latents_with_ids(output[0][:, : noisy.shape[1]], own)
        return _per_item(prediction, batch.target)

    return Step(kwargs, {"hidden_states": 1, "img_ids": 1}, noisy.shape[1], batch.references, loss)


def fibo_edit(hidden: bool = True) -> Step:
    """``scripts/finetune_fibo_edit.py`` of Bria's Fibo-Edit: a mask of pairs, one item without its context.

    diffusers' ``train_dreambooth_fibo_edit.py`` is the same without `hidden`: it shows the context to every item.
    """
    batch = Batch(4, 32, (NOISY,))
    pack, ids = BriaFiboEditPipeline._pack_latents_no_patch, BriaFiboEditPipeline._prepare_latent_image_ids
    noisy, context = (pack(x, ITEMS, 4, *NOISY) for x in (batch.noisy, batch.references[0]))
    own, theirs = (ids(ITEMS, *NOISY, "cpu", torch.float32) for _ in range(2))
    theirs[..., 0] = 1
    shown = torch.ones(context.shape[:2])
    if hidden:
        shown[-1] = 0  # dropped for guidance
    seen = torch.cat([batch.masks.float(), torch.ones(noisy.shape[:2]), shown], 1)
    pairs = torch.where(torch.einsum("bi,bj->bij", seen, seen) == 1, 0.0, -torch.inf)
    kwargs = {
        "hidden_states": torch.cat([noisy, context], 1), "timestep": batch.times,
        "encoder_hidden_states": batch.prompts, "text_encoder_layers": [batch.normal(ITEMS, TEXT, 16) for _ in "abcd"],
        "txt_ids": torch.zeros(TEXT, 3), "img_ids": torch.cat([own, theirs]), "return_dict": False,
        "joint_attention_kwargs": {"attention_mask": pairs[:, None]},
    }  # fmt: skip

    def loss(output: Any) -> Tensor:
        prediction = BriaFiboEditPipeline._unpack_latents_no_patch(output[0][:, : noisy.shape[1]], *NOISY, 1)
        return _per_item(prediction, batch.target) * ITEMS

    return _WithMask(kwargs, {"hidden_states": 1, "img_ids": 0}, noisy.shape[1], batch.references, loss)


def diffusers_qwen21(references: bool = True) -> dict[str, Any]:
    """The call of ``train_dreambooth_lora_qwenimage21_img2img.py``, or of the script without references.

    The reference comes first, and has a slot of the prompt for each 2 x 2 of its tokens.
    """
    batch = Batch(8, 16, SHAPES[:1])
    pictures = [*(x.detach() for x in batch.references if references), batch.noisy]
    slots = [x.shape[2] * x.shape[3] // 4 for x in pictures]
    words = [torch.zeros(ITEMS, 3), torch.ones(ITEMS, sum(slots[:-1])), torch.zeros(ITEMS, 4)]  # the picture in them
    prompt = torch.cat(words, 1).bool()
    return {
        "hidden_states": torch.cat([x.flatten(2).transpose(1, 2) for x in pictures], 1),
        "encoder_hidden_states": batch.normal(*prompt.shape, 16), "encoder_hidden_states_mask": None,
        "timestep": batch.times / 1000, "img_shapes": [[(1, *x.shape[2:]) for x in pictures]] * ITEMS,
        "img_mask": torch.cat([prompt, torch.ones(ITEMS, slots[-1], dtype=torch.bool)], 1), "return_dict": False,
    }  # fmt: skip


class _WithMask(Step):
    def by_hand(self, kept: Tensor) -> dict[str, Any]:
        joint = torch.cat([torch.arange(TEXT + self.noisy), TEXT + self.noisy + kept])
        mask = self.kwargs["joint_attention_kwargs"]["attention_mask"][..., joint, :][..., joint]
        return super().by_hand(kept) | {"joint_attention_kwargs": {"attention_mask": mask}}


def ai_toolkit_kontext() -> Step:
    """``flux_kontext.py``: the control has the target's size, lies behind it in channels, then in the batch."""
    batch = Batch(4, 32, (NOISY,))
    height, width = NOISY[0] // 2, NOISY[1] // 2
    joined = torch.cat([batch.noisy, batch.references[0]], 1)
    latent, control = tokens_of(torch.cat(joined.chunk(2, 1), 0)).chunk(2, 0)
    ids = _grid(0, height, width)[None].repeat(ITEMS, 1, 1).float()
    theirs = ids.clone()
    theirs[..., 0] = 1
    kwargs = {
        "hidden_states": torch.cat([latent, control], 1), "timestep": batch.times / 1000,
        "encoder_hidden_states": batch.prompts, "pooled_projections": batch.pooled,
        "txt_ids": torch.zeros(ITEMS, TEXT, 3)[0], "img_ids": torch.cat([ids, theirs], 1)[0],
        "guidance": torch.tensor([1.0]).expand(ITEMS), "return_dict": False,
    }  # fmt: skip

    def loss(output: Any) -> Tensor:
        return _per_item(latents_of(output[0][:, : latent.shape[1]], *NOISY), batch.target)

    return Step(kwargs, {"hidden_states": 1, "img_ids": 0}, latent.shape[1], batch.references, loss)


def black_forest_flux2() -> Step:
    """musubi-tuner's ``flux_2_train_network.py`` and ai-toolkit's ``flux2_model.py``: several references."""
    batch = Batch(16, 48)
    pictures = [batch.noisy, *batch.references]
    tokens = [x.flatten(2).transpose(1, 2) for x in pictures]
    ids = torch.cat([_grid(10 * i, *x.shape[2:], 1) for i, x in enumerate(pictures)]).expand(ITEMS, -1, -1)
    noisy = tokens[0].shape[1]
    kwargs = {
        "x": torch.cat(tokens, 1), "x_ids": ids, "timesteps": batch.times / 1000, "ctx": batch.prompts,
        "ctx_ids": _grid(0, 1, 1, TEXT).expand(ITEMS, -1, -1), "guidance": torch.full((ITEMS,), 1.0),
    }  # fmt: skip

    def loss(output: Tensor) -> Tensor:
        return _per_item(output[:, :noisy].transpose(1, 2).unflatten(2, NOISY), batch.target)

    return Step(kwargs, {"x": 1, "x_ids": 1}, noisy, batch.references, loss)


def musubi_kontext() -> Step:
    """``flux_kontext_train_network.py``."""
    batch = Batch(4, 32, SHAPES[:1])
    pictures = [batch.noisy, *batch.references]
    tokens = [tokens_of(x) for x in pictures]
    ids = torch.cat([_grid(i, x.shape[2] // 2, x.shape[3] // 2) for i, x in enumerate(pictures)]).float()
    noisy, control = (x.shape[1] for x in tokens)
    kwargs = {
        "img": torch.cat(tokens, 1), "img_ids": ids.repeat(ITEMS, 1, 1), "txt": batch.prompts,
        "txt_ids": torch.zeros(ITEMS, TEXT, 3), "y": batch.pooled, "timesteps": batch.times / 1000,
        "guidance": torch.full((ITEMS,), 1.0), "control_lengths": [control] * ITEMS,
    }  # fmt: skip

    def loss(output: Tensor) -> Tensor:
        return _per_item(latents_of(output[:, :noisy], *NOISY), batch.target)

    return Step(kwargs, {"img": 1, "img_ids": 1}, noisy, batch.references, loss)


class _WithShapes(Step):
    """Qwen's positions follow from shapes: by hand there is one that counts the tokens (see `placed`)."""

    def by_hand(self, kept: Tensor) -> dict[str, Any]:
        shapes = [[item[0], (1, 1, len(kept))] for item in self.kwargs["img_shapes"]]
        return super().by_hand(kept) | {"img_shapes": shapes}


def _qwen(batch: Batch) -> tuple[dict[str, Any], int, list[tuple[int, int, int]]]:
    pictures = [batch.noisy, *batch.references]
    tokens = [QwenImageEditPlusPipeline._pack_latents(x, *x.shape) for x in pictures]
    shapes = [(1, x.shape[2] // 2, x.shape[3] // 2) for x in pictures]
    kwargs = {
        "hidden_states": torch.cat(tokens, 1), "timestep": batch.times / 1000, "guidance": None,
        "encoder_hidden_states": batch.prompts, "encoder_hidden_states_mask": batch.masks,
        "img_shapes": [list(shapes) for _ in range(ITEMS)], "return_dict": False,
    }  # fmt: skip
    return kwargs, tokens[0].shape[1], shapes


def ai_toolkit_qwen() -> Step:
    """``qwen_image_edit_plus.py``: each item's controls behind its target."""
    batch = Batch(4, 16)
    kwargs, noisy, _ = _qwen(batch)

    def loss(output: Any) -> Tensor:
        return _per_item(latents_of(output[0][:, :noisy], *NOISY), batch.target)

    return _WithShapes(kwargs, {"hidden_states": 1}, noisy, batch.references, loss)


def musubi_qwen() -> Step:
    """``qwen_image_train_network.py``: a mask of bools, lengths of prompts, and the shapes once for the batch."""
    batch = Batch(4, 16)
    kwargs, noisy, shapes = _qwen(batch)
    kwargs.pop("return_dict")
    masks = batch.masks.bool()
    kwargs |= {"img_shapes": [shapes], "encoder_hidden_states_mask": masks, "txt_seq_lens": masks.sum(1).tolist()}
    kwargs["additional_t_cond"] = None

    def loss(output: Tensor) -> Tensor:
        return _per_item(latents_of(output[:, :noisy], *NOISY), batch.target)

    return _WithShapes(kwargs, {"hidden_states": 1}, noisy, batch.references, loss)


def simpletuner_qwen(by_token: bool) -> Step:
    """``qwen_image/model.py`` of edit-v2: times by token, or doubled, with an index that says whose a row's is."""
    batch = Batch(4, 16)
    kwargs, noisy, _ = _qwen(batch)
    kwargs["txt_seq_lens"] = batch.masks.sum(1).tolist()
    times, count = batch.times / 1000, kwargs["hidden_states"].shape[1] - noisy
    rows = {"hidden_states": 1}
    if by_token:
        kwargs["timestep"] = _times_by_token(times, noisy, count)
        rows["timestep"] = 1
    else:
        kwargs["timestep"] = torch.cat([times, torch.zeros_like(times)])
        kwargs["modulate_index"] = torch.tensor([[0] * noisy + [1] * count] * ITEMS)
        rows["modulate_index"] = 1

    def loss(output: Any) -> Tensor:
        return _per_item(latents_of(output[0][:, :noisy], *NOISY), batch.target)

    return _WithShapes(kwargs, rows, noisy, batch.references, loss)


def simpletuner_kontext() -> Step:
    """``flux/model.py``: times by token, and a second reference of the same frame, shifted beside the first."""
    batch = Batch(4, 48)
    pictures = [batch.noisy, *batch.references]
    tokens = [tokens_of(x) for x in pictures]
    left = SHAPES[0][1] // 2
    grids = [_grid(0, NOISY[0] // 2, NOISY[1] // 2), _grid(1, SHAPES[0][0] // 2, SHAPES[0][1] // 2),
             _grid(1, SHAPES[1][0] // 2, SHAPES[1][1] // 2, left=left)]  # fmt: skip
    ids = nn.functional.pad(torch.cat(grids).float(), (0, 1))  # the layers below have four axes
    noisy, count = tokens[0].shape[1], sum(x.shape[1] for x in tokens[1:])
    kwargs = {
        "hidden_states": torch.cat(tokens, 1), "timestep": _times_by_token(batch.times / 1000, noisy, count),
        "guidance": torch.tensor([1.0] * ITEMS), "pooled_projections": batch.normal(ITEMS, 48),
        "encoder_hidden_states": batch.prompts, "txt_ids": torch.zeros(TEXT, 4),
        "img_ids": ids.expand(ITEMS, -1, -1), "joint_attention_kwargs": None, "return_dict": False,
    }  # fmt: skip

    def loss(output: Any) -> Tensor:
        return _per_item(latents_of(output[0][:, :noisy], *NOISY), batch.target)

    return Step(kwargs, {"hidden_states": 1, "img_ids": 1, "timestep": 1}, noisy, batch.references, loss)


def simpletuner_flux2() -> Step:
    """``flux2/model.py``: times by token, ids of the first item."""
    batch = Batch(16, 48)
    pictures = [batch.noisy, *batch.references]
    tokens = [x.flatten(2).transpose(1, 2) for x in pictures]
    ids = torch.cat([_grid(10 * i, *x.shape[2:], 1) for i, x in enumerate(pictures)])
    noisy, count = tokens[0].shape[1], sum(x.shape[1] for x in tokens[1:])
    kwargs = {
        "hidden_states": torch.cat(tokens, 1), "encoder_hidden_states": batch.prompts,
        "timestep": _times_by_token(batch.times / 1000, noisy, count), "timestep_sign": None, "img_ids": ids,
        "txt_ids": _grid(0, 1, 1, TEXT), "guidance": torch.full((ITEMS,), 1.0), "return_dict": True,
        "force_keep_mask": None, "hidden_states_buffer": None,
    }  # fmt: skip

    def loss(output: Any) -> Tensor:
        return _per_item(output.sample[:, :noisy, :].transpose(1, 2).unflatten(2, NOISY), batch.target)

    return Step(kwargs, {"hidden_states": 1, "img_ids": 0, "timestep": 1}, noisy, batch.references, loss)

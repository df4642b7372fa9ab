"""A small transformer that asks of a patch what ComfyUI's models ask: wrappers, post_input, attention overridden."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from integrations.comfyui.rows import pack
from integrations.comfyui.sampling import Sampling

HEADS, WIDTH, PATCH = 2, 32, 2


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, skip_reshape: bool = False) -> Tensor:
    """(B, H, S, C) in, (B, S, H C) out."""
    return nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Flux(nn.Module):
    """Known by its name; the rows and the arguments are those of ComfyUI's own, the blocks are not."""

    __module__ = "comfy.ldm.flux.model"
    patch_size = PATCH

    def __init__(self) -> None:
        super().__init__()
        self.img_in, self.txt_in, self.out = nn.Linear(16, WIDTH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 16)
        self.double_blocks = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2)])
        self.single_blocks = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2)])

    def _forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, y: Any = None, ref_latents: Any = None,
        transformer_options: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        options = transformer_options or {}
        latents = [x, *(ref_latents or [])]
        img = self.img_in(torch.cat([pack(latent, PATCH) for latent in latents], dim=1))
        ids = torch.cat([_ids(i, latent) for i, latent in enumerate(latents)])[None].expand(len(x), -1, -1)
        args = {
            "img": img,
            "txt": self.txt_in(context),
            "img_ids": ids,
            "txt_ids": context.new_zeros(*context.shape[:2], 3),
        }
        for change in options.get("patches", {}).get("post_input", ()):
            args = change(args)
        rows = torch.cat([args["txt"], args["img"]], dim=1)
        turned = torch.cat([args["txt_ids"], args["img_ids"]], dim=1).sum(-1, keepdim=True).sin()
        for block in [*self.double_blocks, *self.single_blocks]:
            q, k, v = block(rows + turned).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            attend = options.get("optimized_attention_override")
            given = {"skip_reshape": True, "mask": kwargs.get("attention_mask")}
            found = attention(q, k, v, HEADS, **given) if attend is None else attend(attention, q, k, v, HEADS, **given)
            rows = rows + found
        self.rows = args["img"].shape[1]
        return self.out(rows[:, context.shape[1] :][:, : pack(x, PATCH).shape[1]])


def _ids(image: int, latent: Tensor) -> Tensor:
    height, width = (side // PATCH for side in latent.shape[-2:])
    return torch.cartesian_prod(torch.tensor([float(image)]), torch.arange(height).float(), torch.arange(width).float())


def sampled(
    model: Flux, sampling: Sampling | None, references: list[Tensor], steps: int = 4, marks: tuple[int, ...] = (0,)
) -> tuple[list[Tensor], list[int]]:
    """What the model says at each step, one noise level a step, and the rows that its blocks ran on."""
    sigmas = torch.linspace(1, 0, steps + 1)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
    x, context = x.repeat(len(marks), 1, 1, 1), context.repeat(len(marks), 1, 1)
    latents = [latent.repeat(len(marks), 1, 1, 1) for latent in references] or None
    outputs, rows = [], []

    def loop(*args: Any, **kwargs: Any) -> None:
        for sigma in sigmas[:-1]:
            options: dict[str, Any] = {"sigmas": sigma[None], "cond_or_uncond": list(marks), "uuids": ["a"]}
            if sampling is not None:
                options["patches"] = {"post_input": [sampling.post_input]}
            given = {"x": x, "timestep": sigma[None], "context": context, "ref_latents": latents}
            if sampling is None:
                outputs.append(model._forward(**given, transformer_options=options))
            else:
                executor = _Executor(model)
                outputs.append(sampling.diffusion_model(executor, **given, transformer_options=options))
            rows.append(model.rows)

    with torch.no_grad():
        if sampling is None:
            loop()
        else:
            sampling.outer_sample(loop, None, None, None, sigmas)
    return outputs, rows


class _Executor(SimpleNamespace):
    """What a wrapper is handed: the model, its own forward, and the way on."""

    def __init__(self, model: Flux) -> None:
        super().__init__(class_obj=model, original=model._forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

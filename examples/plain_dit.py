"""A diffusion transformer of your own, not from diffusers, run on the reference tokens that it looks at.

    python examples/plain_dit.py

The library needs to know three things about a model: which argument holds the image tokens, which other arguments hold
one entry a token, and where the references lie. The weights here are random, so the picture means nothing: the example
shows the wiring, which tokens are kept, and what it saves.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

import sparse_ref_attn as sra
from sparse_ref_attn.cost import ModelShape

HEADS, HEAD_DIM, CHANNELS, TEXT = 4, 32, 16, 24
WIDTH = HEADS * HEAD_DIM


# The model: text and image tokens in one sequence, rotary positions from (image, row, column), adaptive layer norm.


def rotation(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (rows, HEAD_DIM / 2) of position ids (rows, 3): a few frequencies for each axis."""
    pairs = HEAD_DIM // 2
    split = (pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8)
    angles = [ids[:, axis, None] * 100.0 ** -(torch.arange(n) / n) for axis, n in enumerate(split)]
    joined = torch.cat(angles, dim=1)
    return joined.cos(), joined.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels of x (B, H, S, HEAD_DIM)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, moment: Tensor) -> Tensor:
        shift, scale, shift_mlp, scale_mlp = self.modulation(moment)[:, None].chunk(4, dim=-1)
        qkv = self.qkv(self.norm(x) * (1 + scale) + shift)
        q, k, v = qkv.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(2 * rms_norm(each, (HEAD_DIM,)), cos, sin) for each in (q, k))
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm(x) * (1 + scale_mlp) + shift_mlp)


class PlainDiT(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.image_in, self.text_in = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.time_in = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU())
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.image_out = nn.Linear(WIDTH, CHANNELS)

    def forward(self, tokens: Tensor, ids: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """tokens (B, rows, CHANNELS), ids (rows, 3), text (B, TEXT, WIDTH), timestep (B,) -> like tokens."""
        x = torch.cat([self.text_in(text), self.image_in(tokens)], dim=1)
        cos, sin = rotation(torch.cat([ids.new_zeros(text.shape[1], 3), ids]))
        moment = self.time_in(timestep[:, None])
        for block in self.blocks:
            x = block(x, cos, sin, moment)
        return self.image_out(x[:, text.shape[1] :])


# The sampler: guidance in one batch, [with the prompt, without].


def grid(image: int, side: int) -> Tensor:
    return torch.cartesian_prod(torch.tensor([float(image)]), torch.arange(side).float(), torch.arange(side).float())


def sample(
    model: PlainDiT,
    references: list[Tensor],
    text: Tensor,
    side: int,
    steps: int,
    handle: sra.PatchHandle | None = None,
) -> Tensor:
    """Euler steps from noise to (side * side, CHANNELS); `references` are (tokens, CHANNELS), the first step is 1.0."""
    latents = torch.randn(1, side * side, CHANNELS, generator=torch.Generator().manual_seed(1))
    ids = torch.cat([grid(image, side) for image in range(1 + len(references))])
    both = torch.cat([text, torch.zeros_like(text)])
    if handle is not None:
        handle.begin(steps=steps)
    for i in range(steps):
        if handle is not None:
            handle.step(i)
        tokens = torch.cat([latents, *(r[None] for r in references)], dim=1).expand(2, -1, -1)
        velocity = model(tokens=tokens, ids=ids, text=both, timestep=torch.full((2,), 1 - i / steps))
        prompted, unprompted = velocity[:, : side * side].chunk(2)
        latents = latents - (unprompted + 2.0 * (prompted - unprompted)) / steps
    return latents[0]


# What the library is told.


def find(kwargs: dict[str, Any]) -> tuple[tuple[int, int], tuple[sra.Reference, ...]]:
    """Rows of the generation (image 0), and of each reference (images 1, 2, ...)."""
    _, counts = kwargs["ids"][:, 0].unique_consecutive(return_counts=True)
    first, *others = counts.tolist()
    references, at = [], first
    for count in others:
        side = round(count**0.5)
        references.append(sra.Reference(at, count, (side, side)))
        at += count
    return (0, first), tuple(references)


def shape(model: nn.Module) -> ModelShape:
    """Which rows each linear layer sees, to count the work. Optional."""
    streams = {
        "image_in": "image",
        "text_in": "text",
        r"time_in\..+|blocks\.\d+\.modulation": "item",
        r"blocks\..+": "joint",
        "image_out": "output",
    }
    return ModelShape.from_module(model, streams, attention_layers=len(model.blocks), heads=HEADS, head_dim=HEAD_DIM)


def adapter(depth: int) -> sra.PlainAdapter:
    return sra.PlainAdapter(
        tokens="tokens",
        rows={"ids": 0},
        find=find,
        text="text",
        attention=["single"] * depth,  # one scaled_dot_product_attention a block, over all tokens
        conditional=lambda kwargs: slice(0, len(kwargs["tokens"]) // 2),  # score the half with the prompt
        positions="ids",
        shape=shape,
        name="plain DiT",
    )


@torch.no_grad()
def main(side: int = 24, references: int = 2, steps: int = 6, keep: float = 0.25) -> dict[str, Any]:
    torch.manual_seed(0)
    model = PlainDiT().eval()
    sra.register_adapter(PlainDiT, adapter(len(model.blocks)))
    images = [torch.randn(side * side, CHANNELS) for _ in range(references)]
    text = torch.randn(1, TEXT, WIDTH)

    sample(model, images, text, side, 1)  # warm up
    began = time.perf_counter()
    dense = sample(model, images, text, side, steps)
    dense_seconds = time.perf_counter() - began

    handle = sra.patch(model, sra.SparseRef("mass", keep))
    began = time.perf_counter()
    sparse = sample(model, images, text, side, steps, handle)
    sparse_seconds = time.perf_counter() - began
    print(handle.summary(dense_seconds=dense_seconds))
    handle.remove()

    same = torch.equal(sample(model, images, text, side, steps), dense)
    error = float((sparse - dense).norm() / dense.norm())
    print(f"\ndense {dense_seconds:.2f} s, sparse {sparse_seconds:.2f} s: {dense_seconds / sparse_seconds:.2f}x")
    print(f"difference from dense {error:.1%}; after remove() bit for bit the same: {same}")
    return {"dense": dense_seconds, "sparse": sparse_seconds, "error": error, "same": same}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=24, help="tokens on each side of every image")
    parser.add_argument("--references", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--keep", type=float, default=0.25, help="share of each reference's tokens")
    main(**vars(parser.parse_args()))

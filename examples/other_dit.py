"""The ops inside a transformer block of your own: plain PyTorch, a ragged batch, random token dropping, ranking.

    python examples/other_dit.py

Each item has its own numbers of text, image and reference tokens. All items are packed, ``[all text | all image]``, and
their references form one bank of keys and values that every item reads by index. The task is small enough for a CPU:
a reference shows a coloured subject on a noisy background, and every image token must become the subject's colour.
Training drops references at random; then the attention mass finds the subject, and a fifth of the tokens does the work.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, rms_norm

from sparse_ref_attn.functional import attention_mass_varlen, gather_attention

HEADS, HEAD_DIM, COLOURS = 2, 32, 4
WIDTH = HEADS * HEAD_DIM
SUBJECT = 5  # one reference token in so many shows the subject


class Batch(NamedTuple):
    """A packed batch: rows are ``[all text | all image]``; `rows` (2, B + 1) says where each item's are."""

    tokens: Tensor  # (T, COLOURS + 1)
    rows: Tensor
    references: Tensor  # (R, COLOURS + 1): colour, and whether the token shows the subject
    bank: Tensor  # (B + 1,) where each item's references begin
    target: Tensor  # (image rows, COLOURS)


class Block(nn.Module):
    """Pre-norm attention over the item's own tokens and its kept references, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.reference_kv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(
        self, x: Tensor, references: Tensor, batch: Batch, kept: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x (T, WIDTH), references (R, WIDTH), kept (indices, offsets) -> x, attention mass of each reference (R,)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(1)
        k_ref, v_ref = self.reference_kv(references).unflatten(-1, (2, HEADS, HEAD_DIM)).unbind(1)
        q, k, k_ref = (3 * rms_norm(each, (HEAD_DIM,)) for each in (q, k, k_ref))
        attended, lse = gather_attention(
            q, k, v, k_ref, v_ref, *kept, cu_seqlens_q=batch.rows, cu_seqlens_k=batch.rows, return_lse=True
        )
        x = x + self.out(attended.flatten(1))
        text = int(batch.rows[1, 0])
        mass = attention_mass_varlen(
            q[text:].detach(), k_ref.detach(), batch.rows[1] - text, batch.bank, batch.bank, batch.bank[:-1],
            references.shape[0], lse=lse[:, text:].detach(), reduce_heads=True,
        )  # fmt: skip
        return x + self.mlp(x), mass


class OtherDiT(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(COLOURS + 1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, COLOURS)

    def forward(self, batch: Batch, kept: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The image rows' colours, and the attention mass of each reference token, summed over the blocks."""
        x, references = self.embed(batch.tokens), self.embed(batch.references)
        mass = torch.zeros(batch.references.shape[0])
        for block in self.blocks:
            x, seen = block(x, references, batch, kept)
            mass = mass + seen
        return self.head(x[int(batch.rows[1, 0]) :]), mass


def draw(items: int, generator: torch.Generator) -> Batch:
    """A batch of random lengths."""

    def lengths(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (items,), generator=generator)

    text, image, refs = lengths(2, 9), lengths(6, 20), lengths(20, 60)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat([text, image]).cumsum(0)])
    rows = torch.stack([ends[: items + 1], ends[items:]]).int()
    bank = torch.cat([torch.zeros(1, dtype=torch.long), refs.cumsum(0)]).int()
    colour = torch.randn(items, COLOURS, generator=generator)
    references = torch.randn(int(bank[-1]), COLOURS + 1, generator=generator)
    subject = torch.arange(references.shape[0]) % SUBJECT == 0
    references[:, -1] = subject.float()
    item = torch.repeat_interleave(torch.arange(items), refs)
    references[subject, :-1] = colour[item[subject]]
    tokens = torch.randn(int(ends[-1]), COLOURS + 1, generator=generator)
    tokens[:, -1] = 0
    return Batch(tokens, rows, references, bank, colour.repeat_interleave(image, 0))


def keep(scores: Tensor, bank: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The best `share` of each item's references by `scores` (R,): indices and offsets."""
    edges = bank.tolist()
    best = []
    for start, stop in pairwise(edges):
        count = max(1, round(share * (stop - start)))
        best.append(start + scores[start:stop].topk(count).indices.sort().values)
    counts = torch.tensor([0, *map(len, best)])
    return torch.cat(best), counts.cumsum(0)


def train(steps: int, seed: int = 0) -> tuple[OtherDiT, list[float]]:
    """Train with a new random share of the references at every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = OtherDiT()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        batch = draw(8, generator)
        share = float(torch.empty(1).uniform_(0.3, 1.0, generator=generator))
        kept = keep(torch.rand(batch.references.shape[0], generator=generator), batch.bank, share)
        loss = mse_loss(model(batch, kept)[0], batch.target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return model, losses


@torch.no_grad()
def compare(model: OtherDiT, share: float = 1 / SUBJECT, seed: int = 1) -> dict[str, float]:
    """Error on new items with all references, with the best by attention mass, and with random ones."""
    generator = torch.Generator().manual_seed(seed)
    batch = draw(16, generator)
    everything = torch.arange(batch.references.shape[0])
    dense, mass = model(batch, (everything, batch.bank))
    error = {"all references": mse_loss(dense, batch.target).item()}
    for name, scores in (("most attention", mass), ("random", torch.rand(mass.shape, generator=generator))):
        pixels, _ = model(batch, keep(scores, batch.bank, share))
        error[f"{name}, {share:.0%}"] = mse_loss(pixels, batch.target).item()
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    model, losses = train(steps)
    print(f"loss {losses[0]:.3f} -> {sum(losses[-10:]) / len(losses[-10:]):.3f} in {steps} steps")
    for name, error in compare(model).items():
        print(f"{name:<22} error {error:.3f}")


if __name__ == "__main__":
    main()

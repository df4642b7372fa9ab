"""The training of the small pipeline's autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from ..errors import NonFiniteError
from ..toy.scenes import scene
from ..toy.sprites import load_sprites
from . import checkpoint
from .log import progress

__all__ = ["toy_crops", "train_vae"]


def toy_crops(sprites: str, size: int, seed: int = 0) -> Callable[[int], Tensor]:
    """Crops of 64 x 64 pixels of the procedural task's pictures, as `train_vae` takes them.

    Parameters
    ----------
    sprites : str
        Folder of the subjects.
    size : int
        Crops per step: of references and of answers in turns.
    seed : int
    """
    subjects = load_sprites(sprites, "train")

    def crops(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        found = []
        for i in range(size):
            pair = scene(subjects, (seed, step * size + i))
            x, y = rng.integers(0, 65, 2)
            found.append((pair.target if i % 2 else pair.references[0])[y : y + 64, x : x + 64])
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous() * 2 - 1

    return crops


def train_vae(
    vae: Any,
    pictures: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float = 2.5e-3,
    seed: int = 0,
    out: Path | None = None,
    checkpoint_every: int = 200,
) -> None:
    """Fit an ``AutoencoderTiny`` to pictures; then set its shift and scale so that latents have mean 0 and deviation 1.

    Parameters
    ----------
    vae : diffusers.AutoencoderTiny
        Changed in place.
    pictures : callable
        Step number to (B, 3, h, w) pictures, -1 to 1.
    steps : int
        Adam steps; the learning rate rises for a tenth of them and then falls to zero along a cosine.
    lr : float
        Its highest value.
    seed : int
        Of the noise.
    out : Path, optional
        Folder for checkpoints. A run that was stopped goes on from its newest one, bit for bit; it keeps the `lr`
        that it began with. Default none.
    checkpoint_every : int
        Steps between checkpoints.

    Raises
    ------
    NonFiniteError
        If the loss is NaN or infinite.
    ConfigError, LayoutError
        As ``checkpoint.save`` and ``checkpoint.load``.

    Notes
    -----
    The loss is the mean absolute error, half of that of the horizontal and vertical differences (edges), and 0.001 of
    the latents' mean square. Noise of deviation 0.05 on the latents keeps the decoder smooth.
    """
    vae.train().requires_grad_(True)
    weights = dict(vae.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr, betas=(0.9, 0.98))
    found, start = None if out is None else checkpoint.latest(out), 0
    if found is not None:
        (adam, noise), about = checkpoint.load(found, weights, {})
        optimizer.load_state_dict(adam)
        generator.set_state(noise)
        start = about["step"]
    total = max(steps, start)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=total, pct_start=0.1, last_epoch=start - 1
    )
    bar = progress(start, steps)
    for step in range(start, steps):
        x = pictures(step)
        z = vae.encode(x).latents
        y = vae.decode(z + 0.05 * torch.randn(z.shape, generator=generator)).sample
        edges = sum(l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (-1, -2))
        loss = l1_loss(y, x) + 0.5 * edges + 1e-3 * z.square().mean()
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss must be finite, got {loss.item()} at step {step + 1}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
        done = step + 1
        if out is not None and (done % checkpoint_every == 0 or done == steps):
            checkpoint.save(out, done, weights, {}, (optimizer.state_dict(), generator.get_state()), {"seed": seed})
    bar.close()
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        z = torch.cat([vae.encode(pictures(steps + i)).latents for i in range(8)])
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())

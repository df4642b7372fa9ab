"""What the loop trains on: batches of encoded pairs, each a pure function of the step and the process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.training_hooks import TrainingHooks
from ..errors import ConfigError
from ..hooks.compiled import unwrap
from ..models import adapter_for, edit_pipelines, facts_of
from ..toy.scenes import TOKEN, scene
from ..toy.sprites import load_sprites
from ..toy.words import LENGTH, OPEN_TASKS, TASKS

__all__ = ["Batch", "ToyBatches", "encode", "seeded", "training_of"]


@dataclass(frozen=True)
class Batch:
    """One batch of encoded pairs.

    Parameters
    ----------
    target : Tensor
        (B, N, D) packed latents of the answers.
    references : Tensor
        (B, R, D) packed latents of the references.
    arguments : dict
        The model's other arguments, such as the prompts and the position ids of both.
    weight : Tensor, optional
        (B, N, 1) weights of the loss, 1 by default.
    subjects : Tensor, optional
        (B, R, D) latents that the model's outputs at the reference rows are to match.
    """

    target: Tensor
    references: Tensor
    arguments: dict[str, Any]
    weight: Tensor | None = None
    subjects: Tensor | None = None

    @property
    def tokens(self) -> int:
        """B (N + R)."""
        return len(self.target) * (self.target.shape[1] + self.references.shape[1])

    def noised(
        self, random: torch.Generator, mean: float, std: float, guidance: float | None
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """A call of the model at noise levels that are drawn for each pair.

        Parameters
        ----------
        random : torch.Generator
            On the CPU.
        mean, std : float
            A level is the sigmoid of a normal variable with these.
        guidance : float, optional
            Given to a model with an embedding of it.

        Returns
        -------
        arguments : dict
        level : Tensor, shape (B,)
        noise : Tensor, shape (B, N, D)
        """
        b, device = len(self.target), self.target.device
        level = torch.sigmoid(torch.randn(b, generator=random) * std + mean).to(device)
        noise = torch.randn(self.target.shape, generator=random).to(device)
        share = level[:, None, None]
        noisy = (1 - share) * self.target + share * noise
        arguments = {
            "hidden_states": torch.cat([noisy, self.references], 1), "timestep": level, **self.arguments,
            "return_dict": False,
        }  # fmt: skip
        if guidance is not None:
            arguments["guidance"] = level.new_full((b,), guidance)
        return arguments, level, noise


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on the numbers alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


@dataclass(frozen=True)
class ToyBatches:
    """Batches of the procedural task; a fifth of the steps have two references.

    Parameters
    ----------
    sprites : str
        Folder of the subjects.
    size : int
        Pairs per batch and process.
    grid : {8, 16}
        Tokens along a side of the pictures.
    seed : int
        Of the pairs.
    subject_weight : float
        Of the loss where the subjects are; 1 elsewhere.
    open_scenery : float
        Share, 0 to 1, of the subjects that are placed, alone or in pairs, whose scenery is left open.

    Raises
    ------
    ConfigError
        For a share outside [0, 1], and as ``load_sprites``.
    """

    sprites: str
    size: int
    grid: int = 16
    seed: int = 0
    subject_weight: float = 3.0
    open_scenery: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.open_scenery <= 1:
            raise ConfigError(f"open_scenery must lie in [0, 1], got {self.open_scenery!r}")
        load_sprites(self.sprites, "train")  # so that a folder without any is refused here

    def __call__(self, pipe: Any, step: int, process: int, processes: int) -> Batch:
        """The batch of one step and process."""
        sprites = load_sprites(self.sprites, "train")
        rng = np.random.default_rng((self.seed, step))
        single = [task for task in TASKS if task != "pair"]
        tasks = ["pair"] * self.size if rng.random() < 0.2 else rng.choice(single, self.size, p=(0.5, 0.2, 0.2, 0.1))
        first = (step * processes + process) * self.size
        if self.open_scenery:
            opened = {placed: task for task, placed in OPEN_TASKS.items()}
            chance = rng.random(self.size) < self.open_scenery
            tasks = [opened.get(str(t), t) if left_open else t for t, left_open in zip(tasks, chance, strict=True)]
        scenes = [scene(sprites, (self.seed, first + i), grid=self.grid, task=str(t)) for i, t in enumerate(tasks)]
        batch = encode(
            pipe, _pixels([s.target for s in scenes]), _pixels([np.concatenate(s.references, 1) for s in scenes]),
            [s.prompt for s in scenes], LENGTH,
        )  # fmt: skip
        device = batch.target.device
        weight = 1 + (self.subject_weight - 1) * _cover([s.mask for s in scenes]).to(device)
        cover = _cover([np.concatenate(s.masks, 1) for s in scenes]).to(device)
        return replace(batch, weight=weight, subjects=batch.references * cover)


def encode(pipe: Any, targets: Tensor, references: Tensor, prompts: list[str], text_tokens: int) -> Batch:
    """Latents and prompts of pairs.

    Several references of a pair stand side by side in one picture, the way stock FLUX.1 Kontext is given them.

    Parameters
    ----------
    pipe : diffusers pipeline
        One that its family says how to train.
    targets, references : Tensor
        (B, 3, height, width) pictures, -1 to 1.
    prompts : list of str
        B of them.
    text_tokens : int
        Length that the prompts are padded or cut to.

    Raises
    ------
    ConfigError
        If nothing says how the pipeline is trained.
    """
    hooks, adapter = training_of(pipe), adapter_for(unwrap(pipe.transformer))
    with torch.no_grad():
        pictures = [x.to(pipe.vae.device, pipe.vae.dtype) for x in (targets, references)]
        (target, rows), (reference, reference_rows) = (adapter.encode(pipe, x) for x in pictures)
        arguments = hooks.arguments(pipe, (rows, reference_rows), prompts, pictures[1], text_tokens)
    return Batch(target.float(), reference.float(), arguments)


def training_of(pipe: Any) -> TrainingHooks:
    """How its family says that the pipeline's model is trained.

    Raises
    ------
    ConfigError
        If it says nothing.
    """
    facts = facts_of(pipe)
    if facts is None or facts.training is None:
        known = " or ".join(facts.name for facts in edit_pipelines() if facts.training is not None)
        raise ConfigError(f"train needs a {known}, got {type(pipe).__name__}")
    return facts.training


def _pixels(pictures: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def _cover(masks: Sequence[Any]) -> Tensor:
    """(B, N, 1) share of each token that the masks cover."""
    x = torch.from_numpy(np.stack(masks))[:, None]
    return torch.nn.functional.avg_pool2d(x, TOKEN).flatten(2).mT

"""The training loop: flow matching with a moving average, resumable bit for bit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, NonFiniteError, VersionError
from . import checkpoint
from .batches import Batch, seeded
from .handle import state_of
from .log import Log, progress
from .patching import TrainingHandle
from .teacher import Teacher

__all__ = ["TrainConfig", "train"]

logger = logging.getLogger("sparse_ref_attn")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Parameters
    ----------
    steps : int
        In all, those of earlier calls included.
    lr : float
        Of AdamW, after `warmup`.
    muon_lr : float or None
        Of Muon for the matrices of the blocks; None trains them with AdamW too.
    warmup : int
        Steps over which the rates rise from 0.
    decay : int
        Last steps, over which the rates fall to 0 along a cosine.
    ema : float
        Decay of the moving average of the weights.
    clip : float
        Largest norm of the gradient.
    reference_loss : float
        Weight of the loss at the reference rows (see ``Batch.subjects``), at least 0. Dropped rows add a constant to
        it and no gradient, so that a kept row learns the same with dropping and without.
    distill : float
        Share of what is learned, in [0, 1], that is not noise minus target but predicted, from every reference token,
        by the model as `train` is given it, which is asked in every step, without gradients.
    sigma_mean, sigma_std : float
        The noise level is the sigmoid of a normal variable with these.
    guidance : float
        Given to a model with an embedding of it.
    precision : {"bf16", "no"}
        Of the matrix products.
    checkpoint_every : int
        Steps between checkpoints; a killed run loses at most these.
    seed : int
        Of noise and noise levels.

    Raises
    ------
    ConfigError
        For a value outside its range.
    """

    steps: int
    lr: float = 2e-3
    muon_lr: float | None = 4e-3
    warmup: int = 100
    decay: int = 0
    ema: float = 0.998
    clip: float = 1.0
    reference_loss: float = 0.1
    distill: float = 0.0
    sigma_mean: float = 0.7
    sigma_std: float = 1.3
    guidance: float = 1.0
    precision: str = "bf16"
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("decay", 0), ("checkpoint_every", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        for name in ("lr", "clip", "sigma_std", *(("muon_lr",) if self.muon_lr is not None else ())):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0 and finite, got {getattr(self, name)!r}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must lie in [0, 1), got {self.ema!r}")
        if not 0 <= self.reference_loss < math.inf:
            raise ConfigError(f"reference_loss must be at least 0 and finite, got {self.reference_loss!r}")
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill must lie in [0, 1], got {self.distill!r}")
        if self.precision not in ("bf16", "no"):
            raise ConfigError(f"precision must be 'bf16' or 'no', got {self.precision!r}")


Batches = Callable[[Any, int, int, int], Batch]


def train(
    pipe: Any,
    batches: Batches,
    config: TrainConfig,
    out: Path,
    *,
    drop: TrainingHandle | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Train the transformer's trainable parameters; continues from the newest checkpoint in `out`, if there is one.

    Several processes, under ``accelerate launch`` or ``torchrun``, share each step: every one has its own batch, and
    the gradients are averaged.

    Parameters
    ----------
    pipe : diffusers pipeline
        Its transformer is trained in place, the rest is frozen.
    batches : callable
        (pipe, step, process, processes) to a `Batch`.
    config : TrainConfig
    out : Path
        Folder for checkpoints and ``log.csv``.
    drop : TrainingHandle, optional
        What ``patch_for_training`` returned for the transformer: its draws continue too.
    about : dict, optional
        JSON types; kept in the checkpoints beside `config`.

    Returns
    -------
    dict of str to Tensor
        The moving average of the trained parameters.

    Raises
    ------
    NonFiniteError
        If the loss is NaN or infinite; the newest checkpoint is from before that.
    ConfigError, LayoutError
        As ``checkpoint.save`` and ``checkpoint.load``; also if the checkpoint is of a run with other optimizers, or
        one drops reference tokens, or lets references run by themselves, and the other does not.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise VersionError("training needs accelerate: pip install 'sparse-ref-attn[train]'") from error

    accelerator = Accelerator(mixed_precision=config.precision)
    pipe.to(accelerator.device)
    transformer = pipe.transformer.train()
    weights = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    if not weights:
        raise ConfigError("the transformer must have trainable parameters, got none")
    ema = {name: p.detach().clone() for name, p in weights.items()}
    optimizers = _optimizers(weights, config)
    teacher = Teacher(transformer, drop) if config.distill else None
    start = 0
    found = checkpoint.latest(out)
    if found is not None:
        start = _resume(found, weights, ema, optimizers, drop, config)
    model = accelerator.prepare(transformer)
    guided = bool(getattr(transformer.config, "guidance_embeds", False))
    log = Log(out, start) if accelerator.is_main_process else None
    bar = progress(start, config.steps)
    for step in range(start, config.steps):
        began = time.perf_counter()
        batch = batches(pipe, step, accelerator.process_index, accelerator.num_processes)
        rate = _rate(config, step)
        for optimizer, top in zip(optimizers, (config.lr, config.muon_lr), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * (top or 0)
        with accelerator.autocast():
            random = seeded(config.seed, step, accelerator.process_index)
            loss, parts = _loss(model, batch, config, random, guided, teacher)
        accelerator.backward(loss)
        value = accelerator.reduce(loss.detach(), "mean").item()
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss must be finite, got {value} at step {step + 1}; the newest checkpoint is "
                f"{checkpoint.latest(out) or 'none'}: continue from it with a lower learning rate"
            )
        norm = accelerator.clip_grad_norm_(list(weights.values()), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        pace = 1 - min(config.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in weights.values()], pace)
        done = step + 1
        tokens = batch.tokens * accelerator.num_processes
        seconds = time.perf_counter() - began
        bar.update()
        bar.set_postfix_str(f"loss {value:.3f}, {tokens / seconds:,.0f} tokens/s")
        if log is not None:
            log.add(done, {"loss": value, **parts, "norm": float(norm), "tokens": tokens, "seconds": seconds})
            if done % config.checkpoint_every == 0 or done == config.steps:
                log.write()
                checkpoint.save(
                    out, done, weights, ema, [o.state_dict() for o in optimizers],
                    {"train": asdict(config), **state_of(drop), **(about or {})},
                )  # fmt: skip
    bar.close()
    accelerator.wait_for_everyone()
    return ema


def _resume(
    found: Path,
    weights: dict[str, Any],
    ema: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    drop: TrainingHandle | None,
    config: TrainConfig,
) -> int:
    """Take up the run where its checkpoint is; how many steps are done."""
    states, stored = checkpoint.load(found, weights, ema)
    changed = [
        f"{name} {stored['train'][name]!r}, now {value!r}"
        for name, value in asdict(config).items()
        if name not in ("steps", "checkpoint_every") and stored["train"].get(name, value) != value
    ]
    if changed:
        logger.warning("%s goes on with other settings than it was trained with: %s", found, "; ".join(changed))
    isolate = state_of(drop)["isolate"]
    if stored.get("isolate") != isolate:
        raise ConfigError(
            f"a run must go on as it began: {found} was trained with isolate={stored.get('isolate')}, and this run has "
            f"{isolate}. Begin another one from its weights (--init), in a folder of its own"
        )
    dropped = stored["draws"] is not None
    if dropped != (drop is not None):
        words = ("with", "without") if dropped else ("without", "with")
        raise ConfigError(
            f"a run must go on as it began: {found} was trained {words[0]} dropping, and this run is {words[1]} it. "
            "Begin another one from its weights (--init), in a folder of its own"
        )
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    except ValueError as error:
        raise ConfigError(f"{found} must be of a run with the same optimizers (muon_lr), got: {error}") from error
    if drop is not None:
        drop.load_state_dict(stored["draws"])
    return int(stored["step"])


def _optimizers(weights: dict[str, Any], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside the blocks other than the modulations."""
    matrices = {
        name for name, p in weights.items()
        if config.muon_lr is not None and p.ndim == 2 and "blocks" in name and "norm" not in name
    }  # fmt: skip
    rest = [p for name, p in weights.items() if name not in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                [p for name, p in weights.items() if name in matrices], lr=config.muon_lr or 0.0, momentum=0.95,
                weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw",
            )
        )  # fmt: skip
    return optimizers


def _rate(config: TrainConfig, step: int) -> float:
    """Share of the learning rate at a step."""
    left = config.steps - step
    fall = 0.5 - 0.5 * math.cos(math.pi * left / config.decay) if left < config.decay else 1.0
    return min(1.0, (step + 1) / max(1, config.warmup)) * fall


def _loss(
    model: Any, batch: Batch, config: TrainConfig, random: torch.Generator, guided: bool, teacher: Teacher | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Weighted squared error of the velocity: noise minus target, or a share of it the teacher's."""
    guidance = config.guidance if guided else None
    arguments, sigma, noise = batch.noised(random, config.sigma_mean, config.sigma_std, guidance)
    n, level = batch.target.shape[1], sigma[:, None, None]
    velocity = noise - batch.target
    if teacher is not None:
        velocity = velocity.lerp(teacher(arguments)[:, :n].float(), config.distill)
    out = model(**arguments)[0].float()
    error = (out[:, :n] - velocity).square()
    loss = (error if batch.weight is None else error * batch.weight).mean()
    parts = {"velocity": error.detach().mean().item()}
    if batch.weight is not None:
        subject = batch.weight - 1
        clean = (error.detach() * level.square() * subject).sum() / subject.sum() / error.shape[-1]
        parts["subject"] = clean.item()
    if config.reference_loss and batch.subjects is not None and out.shape[1] == n + batch.subjects.shape[1]:
        loss = loss + config.reference_loss * (out[:, n:] - batch.subjects).square().mean()
    return loss, parts

"""The training of a selector: masses are measured on pairs, and a head learns to tell them before the first step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.model_words import model_words
from ..adapters.weights import weights_fingerprint
from ..checks import is_int
from ..errors import ConfigError, NonFiniteError, VersionError
from ..hooks.compiled import unwrap
from ..models import adapter_for
from ..run.profile import block_indices
from ..selection import AttentionMass
from ..selection.head import Head, Origin
from ..selection.stability import spearman
from ..toy.words import seeded as seeded_weights
from .batches import seeded
from .log import Log, progress
from .loop import Batches
from .masses import Masses, MassStore, measure

__all__ = ["SELECTOR", "SelectorConfig", "fit", "likeness", "train_selector"]

SELECTOR = "selector.safetensors"
"""What is written into a run's folder."""

HELD_BACK = 8
"""Of so many batches one is not learned from: it tells how the head does on others."""


@dataclass(frozen=True)
class SelectorConfig:
    """How to train a selector.

    Parameters
    ----------
    steps : int
        Batches whose masses are measured, those of earlier calls included.
    updates : int
        Of the head, each on one of those batches.
    lr : float
        Of AdamW; it rises for a twentieth of the updates and falls to 0 along a cosine.
    blocks : {"single", "double", "all"} or sequence of int
        Whose attention is learned, as in `AttentionMass`. All of them are measured, so that a run may be fitted anew.
    channels : int
        Inside the head.
    sigma_mean, sigma_std : float
        The noise level of a pair is the sigmoid of a normal variable with these.
    guidance : float
        Given to a model with an embedding of it.
    seed : int
        Of the noise, the head's first weights and the order of the updates.

    Raises
    ------
    ConfigError
        For a value outside its range.
    """

    steps: int
    updates: int = 3000
    lr: float = 2e-3
    blocks: str | Sequence[int] = "single"
    channels: int = 32
    sigma_mean: float = 0.7
    sigma_std: float = 1.3
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("updates", 1), ("channels", 1), ("seed", 0)):
            if not is_int(getattr(self, name), least):
                raise ConfigError(f"{name} must be an int of at least {least}, got {getattr(self, name)!r}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr must be above 0 and finite, got {self.lr!r}")
        object.__setattr__(self, "blocks", AttentionMass(self.blocks).blocks)


def train_selector(
    pipe: Any, batches: Batches, config: SelectorConfig, out: Path, *, about: Mapping[str, Any] | None = None
) -> Head:
    """Distil a head from the attention that a pipeline's transformer pays to its references.

    Each batch's masses are a function of the settings and its number alone, and are kept in ``out/masses``: a run that
    was stopped measures what is missing, and the head is the same, bit for bit. Several processes, under ``accelerate
    launch`` or ``torchrun``, share the measuring.

    Parameters
    ----------
    pipe : diffusers pipeline
        Its transformer is read, never changed.
    batches : callable
        (pipe, step, process, processes) to a `Batch`.
    config : SelectorConfig
    out : Path
        Gets ``masses/``, ``log.csv`` and ``selector.safetensors``.
    about : mapping, optional
        JSON types: what the pairs are drawn from. Kept in the head, and a run goes on with the same only.

    Returns
    -------
    Head

    Raises
    ------
    ConfigError, IncompatibleError
        As `measure` and `MassStore`.
    NonFiniteError
        If the loss is NaN or infinite.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise VersionError("training needs accelerate: pip install 'sparse-ref-attn[train]'") from error

    state = PartialState()
    pipe.to(state.device)
    transformer = unwrap(pipe.transformer).eval()
    adapter, weights = adapter_for(transformer), weights_fingerprint(transformer)
    measured = {name: getattr(config, name) for name in ("sigma_mean", "sigma_std", "guidance", "seed")}
    blocks = block_indices(config.blocks, [site.kind for site in adapter.sites(transformer)])
    store = MassStore(out / "masses", {**measured, **(about or {}), "weights": weights})
    guided = bool(getattr(transformer.config, "guidance_embeds", False))
    missing = [number for number in range(config.steps) if not store.has(number)]
    bar = progress(config.steps - len(missing), config.steps)
    for number in missing[state.process_index :: state.num_processes]:
        batch = batches(pipe, number, 0, 1)
        random = seeded(config.seed, number)
        guidance = config.guidance if guided else None
        arguments, _, _ = batch.noised(random, config.sigma_mean, config.sigma_std, guidance)
        store.put(number, measure(transformer, adapter, arguments))
        bar.update(state.num_processes)
    bar.close()
    state.wait_for_everyone()
    found = [store.get(number) for number in range(config.steps)]
    learned = {"config": asdict(config), **(about or {}), "pairs": sum(len(masses.mass) for masses in found)}
    origin = Origin(model_words(adapter, transformer), weights, learned)
    return fit(found, blocks, config, origin, out, tell=state.is_main_process)


def fit(
    found: Sequence[Masses],
    blocks: Collection[int],
    config: SelectorConfig,
    origin: Origin,
    out: Path,
    *,
    tell: bool = True,
) -> Head:
    r"""Train a head on the mean of some blocks' masses; where `tell` says so it is written, with the curve of the loss.

    The loss is the divergence of the head's shares from the measured ones, mean over the items,

    .. math:: \sum_k p(k) \log \frac{p(k)}{\operatorname{softmax}_k h(x)_k}, \quad p(k) = m(k) / \sum_{k'} m(k')
    """
    count = len(found) // HELD_BACK
    learned, others = found[: len(found) - count], found[len(found) - count :]
    with seeded_weights(config.seed):
        head = Head(found[0].tokens.shape[-1], origin, text=found[0].prompt.shape[-1], channels=config.channels)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=0.01)
    order = torch.randint(len(learned), (config.updates,), generator=seeded(config.seed))
    log, bar = Log(out, 0), progress(0, config.updates)
    for update, number in enumerate(order.tolist()):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _rate(update, config.updates)
        loss = _loss(head, learned[number], blocks)
        if not math.isfinite(loss.item()):
            raise NonFiniteError(f"the loss must be finite, got {loss.item()} at update {update + 1}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        log.add(update + 1, {"loss": loss.item()})
        bar.update()
    bar.close()
    head.eval().requires_grad_(False)
    head.origin = Origin(
        origin.model, origin.weights, {**origin.trained, "rank_correlation": likeness(head, others, blocks)}
    )
    if tell:
        log.write()
        head.save(out / SELECTOR)
    return head


def likeness(head: Head, measured: Sequence[Masses], blocks: Collection[int]) -> float | None:
    """Mean rank correlation of a head's shares with measured masses, over items and references; None without any."""
    found: list[float] = []
    with torch.no_grad():
        for masses in measured:
            sizes = [rows.shape[1] for rows in masses.rows]
            for ours, theirs in zip(
                head.shares(masses.rows, masses.grids, masses.prompt), masses.share(blocks), strict=True
            ):
                found += spearman(ours.split(sizes), theirs.split(sizes))
    return sum(found) / len(found) if found else None


def _loss(head: Head, masses: Masses, blocks: Collection[int]) -> Tensor:
    share = masses.share(blocks)
    lost = torch.special.xlogy(share, share) - share * head.shares(masses.rows, masses.grids, masses.prompt)
    return lost.sum(-1).mean()


def _rate(update: int, updates: int) -> float:
    """Share of the learning rate."""
    rise = max(1, updates // 20)
    return min(1.0, (update + 1) / rise) * (0.5 + 0.5 * math.cos(math.pi * update / updates))

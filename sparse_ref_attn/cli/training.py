"""``sra train``: what it does with its arguments."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..eval import loading
from ..eval.outputs import check_name
from ..hooks.diffusers import applied_loras
from ..patching.trained import BESIDE
from ..toy.pipeline import TRAINED, build_vae, toy_pipeline
from ..training import IsolateReferences, RandomDrop, checkpoint, patch_for_training
from ..training.batches import ToyBatches, training_of
from ..training.folder import FolderBatches
from ..training.isolate_references import said_of
from ..training.loop import TrainConfig
from ..training.loop import train as loop
from ..training.lora import add_lora, save_lora
from ..training.selector import SELECTOR, SelectorConfig, train_selector
from ..training.vae import toy_crops, train_vae
from .values import typed

__all__ = ["train"]


def train(options: argparse.Namespace) -> None:
    """The small model on the procedural task, or a LoRA of a real one on a folder."""
    check_name(options.out)
    if (options.sprites is None) == (options.data is None):
        raise ConfigError("train needs --sprites (the small model) or --data with --model (a real one)")
    if (options.data is None) != (options.model is None):
        raise ConfigError("--data and --model must be given together, got one of them")
    if options.vae and options.sprites is None:
        raise ConfigError("--vae must come with --sprites, got --data")
    for name in ("init", "reference_loss", "open_scenery"):
        if getattr(options, name) is not None and options.sprites is None:
            raise ConfigError(f"--{name.replace('_', '-')} must come with --sprites, got --data")
    for name, other in product(("vae", "selector"), ("isolate", "distill")):
        if getattr(options, name) and getattr(options, other):
            raise ConfigError(f"--{other} trains a transformer, got --{name}")
    for name in ("vae", "keep"):
        if options.selector and getattr(options, name):
            raise ConfigError(f"--selector trains a selector alone, got --{name}")
    for name in ("blocks", "updates"):
        if getattr(options, name) is not None and not options.selector:
            raise ConfigError(f"--{name} must come with --selector, got none")
    if options.lora_rank is not None and (options.vae or options.selector):
        raise ConfigError(f"--lora-rank is of a transformer, got --{'vae' if options.vae else 'selector'}")
    if options.lora_rank is not None and options.sprites is not None and options.init is None:
        raise ConfigError("--lora-rank with --sprites must come with --init, whose weights it is added to, got none")
    if options.vae:
        _vae(options)
        return
    if options.selector:
        _selector(options)
        return
    small = options.sprites is not None
    pipe, batches = _small(options) if small else _real(options)
    rates = (2e-3, 4e-3) if small and options.lora_rank is None else (1e-4, None)
    config = TrainConfig(
        steps=options.steps,
        lr=rates[0] if options.lr is None else options.lr,
        muon_lr=rates[1] if options.muon_lr is None else options.muon_lr,
        warmup=options.warmup, decay=options.decay, ema=options.ema, precision=options.precision,
        checkpoint_every=options.checkpoint_every, seed=options.seed, distill=options.distill,
        **({} if options.reference_loss is None else {"reference_loss": options.reference_loss}),
    )  # fmt: skip
    setting = _setting(options)
    drop = None if setting is None else patch_for_training(pipe.transformer, setting)
    out = Path(options.out)
    about: dict[str, Any] = {"command": typed(options)}
    ema = loop(pipe, batches, config, out, drop=drop, about=about)
    if drop is not None:
        drop.remove()
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        if small:
            about["open_scenery"] = batches.open_scenery
        _write(pipe, out, ema, drop, small, {"train": asdict(config), **about})


def _setting(options: argparse.Namespace) -> RandomDrop | IsolateReferences | None:
    """What becomes of the references in training."""
    drop = None
    if options.keep is not None:
        drop = RandomDrop(
            options.keep, distribution=options.keep_distribution, full_probability=options.full, seed=options.seed
        )
    return drop if options.isolate is None else IsolateReferences(options.isolate, drop=drop)


def _toy_batches(options: argparse.Namespace) -> ToyBatches:
    left_open = 0.0 if options.open_scenery is None else options.open_scenery
    return ToyBatches(options.sprites, options.batch, grid=options.grid, seed=options.seed, open_scenery=left_open)


def _small(options: argparse.Namespace) -> tuple[Any, Any]:
    batches = _toy_batches(options)
    pipe = toy_pipeline(None, seed=options.seed)
    pipe.transformer.requires_grad_(True)
    if options.init is not None:
        checkpoint.begin_from(Path(options.init), dict(pipe.transformer.named_parameters()))
    if options.lora_rank is not None:
        add_lora(pipe.transformer, options.lora_rank, training_of(pipe).lora)
    return pipe, batches


def _vae(options: argparse.Namespace) -> None:
    vae = build_vae(options.seed)
    crops = toy_crops(options.sprites, options.batch, seed=options.seed)
    out = Path(options.out)
    train_vae(
        vae, crops, steps=options.steps, lr=2.5e-3 if options.lr is None else options.lr, seed=options.seed, out=out,
        checkpoint_every=options.checkpoint_every,
    )  # fmt: skip
    with checkpoint.whole(out / "vae", "the autoencoder") as folder:
        vae.save_pretrained(folder)
    print(f"Autoencoder written to {out / 'vae'}")


def _selector(options: argparse.Namespace) -> None:
    small, given = options.sprites is not None, {"blocks": options.blocks, "updates": options.updates, "lr": options.lr}
    config = SelectorConfig(
        options.steps, seed=options.seed, **{name: value for name, value in given.items() if value is not None}
    )
    if small:
        batches: Any = _toy_batches(options)
        pipe = toy_pipeline(TRAINED)
        if options.init is not None:
            checkpoint.begin_from(Path(options.init), dict(pipe.transformer.named_parameters()))
    else:
        pipe, batches = _folder(options)
    names = ("batch", "grid", "open_scenery") if small else ("batch", "side", "text_tokens")
    out, about = Path(options.out), {name: getattr(options, name) for name in names}
    head = train_selector(pipe, batches, config, out, about=about)
    told = head.origin.trained["rank_correlation"]
    if told is not None:
        print(f"Rank correlation with the attention of pairs that were held back: {told:.3f}")
    print(f"Selector written to {out / SELECTOR}")


def _folder(options: argparse.Namespace) -> tuple[Any, FolderBatches]:
    """A real pipeline, and pairs that fit it."""
    batches = FolderBatches(
        options.data, options.batch, side=options.side, text_tokens=options.text_tokens, seed=options.seed
    )
    pipe, _ = loading.load_pipeline(options.model)
    try:
        training_of(pipe)
    except ConfigError as error:
        raise ConfigError(f"{error} from {options.model}") from error
    batches.check(pipe)
    return pipe, batches


def _real(options: argparse.Namespace) -> tuple[Any, Any]:
    pipe, batches = _folder(options)
    add_lora(pipe.transformer, options.lora_rank or 16, training_of(pipe).lora)
    return pipe, batches


def _write(pipe: Any, out: Path, ema: dict[str, Any], drop: Any, small: bool, about: dict[str, Any]) -> None:
    """The moving average where a pipeline finds it, with the settings that it was trained by."""
    settings = None if drop is None else drop.drop
    if not small:
        print(f"LoRA written to {save_lora(pipe, out, ema, settings)}")
        return
    weights = dict(pipe.transformer.named_parameters())
    for name, value in ema.items():
        weights[name].data.copy_(value)
    if applied_loras(pipe.transformer):
        pipe.transformer.fuse_lora()
        pipe.transformer.unload_lora()
    said = {**said_of(settings), **about}
    with checkpoint.whole(out / "transformer", "the trained transformer") as folder:
        pipe.transformer.save_pretrained(folder)
        (folder / BESIDE).write_text(json.dumps(said, indent=2))
    print(f"Transformer written to {out / 'transformer'}")

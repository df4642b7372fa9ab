"""What each command does with its arguments."""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import doctor
from ..adapters import estimate as estimates
from ..config import ReCAST, SparseContext, SparseRef
from ..errors import ConfigError, SparseRefError
from ..eval import loading, outputs
from ..eval.compare import Comparison, compare
from ..eval.embedded import SIZES, Size, kontext_pipeline
from ..eval.geometry import meta_transformer
from ..kernels import toolchain
from ..kernels.build import build_kernels
from . import execution

__all__ = [
    "RANDOM_WEIGHTS",
    "build",
    "caller",
    "compare_methods",
    "demo",
    "diagnose",
    "embedded_arguments",
    "estimate",
    "loaded",
    "photo_of",
    "quiet",
    "run",
]

RANDOM_WEIGHTS = (
    "Its weights are random (seeded): the pictures mean nothing, and neither does what the model looks at.\n"
    "Real are the speed of a whole call, and which tokens the rule keeps of the photo."
)


# -- demo ------------------------------------------------------------------------------------


def demo(options: argparse.Namespace) -> None:
    """Dense and sparse side by side, on random weights."""
    keep = options.keep
    if keep is None and options.preset == "sparse-context":
        keep = 0.25
    task = "subject" if options.preset == "recast" else "edit"
    config = _config(options.preset, keep, task=task, **execution.settings(options))
    photo = photo_of(options.image)
    directory = outputs.prepare_directory(options.out)
    quiet(pipelines_too=True)
    size = SIZES[options.size]
    began = time.perf_counter()
    pipe = kontext_pipeline(options.size)
    seconds = time.perf_counter() - began
    print(f"Built a small FLUX.1 Kontext pipeline of diffusers' own classes in {seconds:.1f} s.\n{RANDOM_WEIGHTS}")
    if options.preset == "recast":
        print('ReCAST runs with task="subject": random attention is near uniform, and the guard of "auto" keeps all.')
    arguments = embedded_arguments(size, photo, options.prompt, options.steps)
    about = {"weights": "seeded random numbers: the pictures mean nothing"}
    _compare(pipe, config, arguments, options, directory, "cpu", about)


def compare_methods(options: argparse.Namespace) -> None:
    """Many methods on one call; what it needs is only imported here."""
    try:
        from . import comparing
    except ImportError as error:
        raise ConfigError(
            f"sra compare needs the package {error.name}, which is not installed: pip install 'sparse-ref-attn[eval]'"
        ) from error
    comparing.compare(options)


def photo_of(path: str | None) -> Any:
    """The image at `path`, or the bundled photo."""
    return loading.open_image(path or str(importlib.resources.files("sparse_ref_attn") / "assets" / "photo.jpg"))


def embedded_arguments(size: Size, photo: Any, prompt: str, steps: int) -> dict[str, Any]:
    """Of the embedded pipeline's call, the photo at about the area that it is meant for."""
    photo = _fitted(photo, size.side, size.pixels_per_token)
    return {
        "prompt": prompt,
        "image": photo,
        "height": photo.height,
        "width": photo.width,
        "max_area": photo.height * photo.width,
        "_auto_resize": False,
        "max_sequence_length": size.text,
        "num_inference_steps": steps,
    }


def _fitted(photo: Any, side: int, multiple: int) -> Any:
    """The photo at an area of about ``side**2`` pixels, its sides multiples of `multiple`."""
    scale = side / (photo.width * photo.height) ** 0.5
    width, height = (max(1, round(scale * edge / multiple)) * multiple for edge in photo.size)
    return photo if (width, height) == photo.size else photo.resize((width, height))


# -- run -------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Dense and sparse side by side, on a real model."""
    given = {name: value for name in ("task", "select") if (value := getattr(options, name)) is not None}
    config = _config(options.preset, options.keep, **given, **execution.settings(options))
    directory = outputs.prepare_directory(options.out)
    pipe, device, arguments = loaded(options)
    about = {"model": options.model, "images": options.image}
    _compare(pipe, config, arguments, options, directory, device, about)


def loaded(options: argparse.Namespace) -> tuple[Any, str, dict[str, Any]]:
    """The pipeline of ``--model``, its device, and the arguments of its call."""
    if (options.height is None) != (options.width is None):
        raise ConfigError("--height and --width must be given together, got one of them")
    size = None if options.height is None else (options.height, options.width)
    images = [loading.open_image(path) for path in options.image]
    quiet(pipelines_too=False)
    pipe, device = loading.load_pipeline(
        options.model, device=options.device, dtype=options.dtype, offload=options.offload
    )
    more = dict(options.set or ())
    arguments = loading.call_arguments(pipe, images, options.prompt, size=size, steps=options.steps, more=more)
    print(f"Loaded {type(pipe).__name__} from {options.model} on {device}.")
    return pipe, device, arguments


def caller(pipe: Any, arguments: dict[str, Any], seed: int) -> Callable[[int], Any]:
    """``call(steps) -> picture``, from the same noise every time; what diffusers refuses is the library's error."""

    def call(steps: int) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            return pipe(**arguments, num_inference_steps=steps, generator=generator).images[0]
        except ValueError as error:  # how diffusers refuses a picture or an argument
            if isinstance(error, SparseRefError):
                raise
            raise ConfigError(f"{type(pipe).__name__} refused the call: {error}") from error

    return call


def _compare(
    pipe: Any,
    config: SparseRef,
    arguments: dict[str, Any],
    options: argparse.Namespace,
    directory: Any,
    device: str,
    about: dict[str, Any],
) -> None:
    steps = arguments.pop("num_inference_steps")

    call = caller(pipe, arguments, options.seed)
    where = doctor.device(device)
    print(f"{options.preset}: {config.describe()}; {steps} steps, seed {options.seed}; {where}.\n", flush=True)
    result = compare(pipe, config, call, steps=steps, repeats=options.repeats, dense=options.compare_dense)
    about = {
        "pipeline": type(pipe).__name__,
        **about,
        "device": where,
        "arguments": {k: v for k, v in arguments.items() if k != "image"} | {"steps": steps},
        "preset": options.preset,
        "seed": options.seed,
        "versions": doctor.versions(),
    }
    _print(result, outputs.write(directory, result, about), directory)


def _print(result: Comparison, files: list[tuple[str, str]], directory: Any) -> None:
    print(f"\n{outputs.table(result)}\n\nInside the transformer, sparse run\n")
    print(f"{result.summary()}\n\nWritten to {directory}")
    for name, what in files:
        print(f"  {name:<12} {what}")


# -- estimate, build-kernels, doctor ---------------------------------------------------------


def estimate(options: argparse.Namespace) -> None:
    """Tokens, work and memory of a run, without running it."""
    quiet(pipelines_too=True)
    found = estimates.estimate(
        meta_transformer(options.model),
        references=[options.size] * options.references,
        output=options.output,
        text_tokens=options.text_tokens,
        steps=options.steps,
        config=_config(options.preset, options.keep, **execution.settings(options)),
    )
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.summary())


def build(options: argparse.Namespace) -> None:
    """The CUDA C++ kernels, compiled into the user's cache."""
    archs = toolchain.requested_archs() if options.archs is None else toolchain.parse_archs(options.archs)
    if not archs and torch.cuda.is_available() and torch.version.hip is None:
        cards = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        archs = tuple(dict.fromkeys(map(toolchain.arch_for, cards)))
    began = time.perf_counter()
    path = build_kernels(archs or None, verbose=True)
    print(f"Built {path} in {time.perf_counter() - began:.0f} s.")


def diagnose(options: argparse.Namespace) -> None:
    """What is installed, and what is possible here."""
    print(json.dumps(doctor.diagnose(), indent=2) if options.json else doctor.report())


# -- shared ----------------------------------------------------------------------------------


def _config(preset: str, keep: float | int | None, **settings: Any) -> SparseRef:
    """The preset with its own defaults for what is not given."""
    if preset == "sparse-context":
        return SparseContext(**settings) if keep is None else SparseContext(keep, **settings)
    if keep is None:
        return ReCAST(**settings)
    if isinstance(keep, int):
        raise ConfigError(f"--keep of recast must be a share such as 0.25 or 25%, got {keep} tokens")
    if not 0 < keep <= 1:
        raise ConfigError(f"--keep must lie in (0, 1] as a share, got {keep}")
    most = 4096  # ReCAST's reference size; the budget is a ratio of it
    last = max(1, round(keep * most))
    return ReCAST(max(1, last // 4), last, reference_tokens=most, **settings)


def quiet(pipelines_too: bool) -> None:
    """Silence notes about optional parts that other libraries lack; diffusers may warn about a real model's call."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("transformers", "diffusers")[: 1 + pipelines_too]:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(f"{name}.utils.logging").set_verbosity_error()

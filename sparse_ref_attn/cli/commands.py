"""What each command does with its arguments."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import doctor
from ..config import SparseRef
from ..errors import ConfigError, SparseRefError
from ..estimation import estimate as estimated
from ..eval import calls, loading, outputs
from ..eval.compare import compare
from ..eval.geometry import meta_transformer, pipeline_of
from ..kernels import toolchain
from ..kernels.build import build_kernels
from ..pictures import open_image
from ..toy.scenes import Scene
from . import builtin, execution, failures
from .amount import Amount
from .memory import memory_of
from .terminal import saved, show

__all__ = [
    "build",
    "caller",
    "compare_methods",
    "demo",
    "diagnose",
    "estimate",
    "loaded",
    "needs",
    "quiet",
    "settings",
]

# -- demo ------------------------------------------------------------------------------------


def demo(options: argparse.Namespace) -> None:
    """Dense and sparse side by side, on a built-in pipeline."""
    made = builtin.builtin(options, options.image)
    small = made.pair is not None
    preset = options.preset = options.preset or ("recast" if small else "sparse-context")
    given = settings(options)
    if preset == "sparse-context":
        given.setdefault("task", "subject" if small else "edit")
        options.keep = 0.25 if options.keep is None else options.keep
    elif not small:
        given.setdefault("task", "subject")
    if small and preset == "recast" and options.keep is None:
        given |= {"n_min": 0.25, "n_max": 0.25}  # the paper's ramp would begin with 16 tokens of 256
    amount = Amount(preset, options.keep, given)
    directory = outputs.prepare_directory(options.out)
    quiet(pipelines_too=True)
    began = time.perf_counter()
    pipe = made.build()
    seconds = time.perf_counter() - began
    config = amount.config(pipe.transformer, made.steps)
    show(f"Built a small FLUX.1 Kontext pipeline of diffusers' own classes in {seconds:.1f} s.\n{made.note}")
    if preset == "recast" and not small and options.task is None:
        show('ReCAST runs with task="subject": random attention is near uniform, and the guard of "auto" keeps all.')
    if small:
        show(f'Prompt: "{made.arguments["prompt"]}"')
    about = {"weights": made.note.replace("\n", " "), "prompt": made.arguments["prompt"]}
    arguments = made.arguments | {"num_inference_steps": made.steps}
    _compare(pipe, config, arguments, options, directory, "cpu", about, made.pair)


def compare_methods(options: argparse.Namespace) -> None:
    """Many methods on one call; what it needs is only imported here."""
    needs("compare", "diffusers", "eval")
    from . import comparing

    comparing.compare(options)


def needs(command: str, *extras: str) -> None:
    """Refuse a command before it does anything, where packages of these extras are not installed."""
    if why := doctor.missing(*extras):
        raise ConfigError(f"sra {command} cannot run: {why}")


# -- a real model ----------------------------------------------------------------------------


def loaded(options: argparse.Namespace) -> tuple[Any, str, dict[str, Any]]:
    """The pipeline of ``--model``, its device, and the arguments of its call."""
    if (options.height is None) != (options.width is None):
        raise ConfigError("--height and --width must be given together, got one of them")
    size = None if options.height is None else (options.height, options.width)
    if options.output is not None:
        if size is not None:
            raise ConfigError("the output must have one size, got --output beside --height and --width")
        size = options.output[1], options.output[0]
    calls.check_reserved(dict(options.set or ()))
    images = [open_image(path) for path in options.image]
    quiet(pipelines_too=False)
    pipe, device = loading.load_pipeline(
        options.model, device=options.device, dtype=options.dtype, offload=options.offload
    )
    more = dict(options.set or ())
    arguments = calls.call_arguments(pipe, images, options.prompt, size=size, steps=options.steps, more=more)
    show(f"Loaded {type(pipe).__name__} from {options.model} on {device}.")
    return pipe, device, arguments


def caller(pipe: Any, arguments: dict[str, Any], seed: int) -> Callable[[int], Any]:
    """``call(steps) -> picture``, from the same noise every time; what diffusers refuses is the library's error."""

    def call(steps: int) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            return pipe(**arguments, num_inference_steps=steps, generator=generator).images[0]
        except (TypeError, ValueError) as error:  # how diffusers refuses a picture or an argument
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
    pair: Scene | None = None,
) -> None:
    steps = arguments.pop("num_inference_steps")
    call = caller(pipe, arguments, options.seed)
    where = doctor.device(device)
    show(f"{options.preset}: {config.describe()}; {steps} steps, seed {options.seed}; {where}.\n")
    pictures = outputs.Pictures(directory)
    with failures.told(directory, pictures.written, memory_of(pipe, config, arguments, options)):
        result = compare(pipe, config, call, steps=steps, repeats=options.repeats, made=pictures)
    about = {
        "pipeline": type(pipe).__name__,
        **about,
        "device": where,
        "arguments": {k: v for k, v in arguments.items() if k != "image"} | {"steps": steps},
        "preset": options.preset,
        "seed": options.seed,
        "versions": doctor.versions(),
    }
    files = []
    if pair is not None:
        files = outputs.write_answer(directory, arguments["image"], pair, result)
        about["psnr_db"] = outputs.against_answer(result, pair)
    files += outputs.write(directory, result, about)
    show(f"\n{outputs.table(result)}\n\nInside the transformer, sparse run\n\n{result.summary()}")
    if pair is not None:
        show("\n" + "\n".join(f"{name}: {value:.1f} dB" for name, value in about["psnr_db"].items()))
    saved(directory, files)


# -- estimate, build-kernels, doctor ---------------------------------------------------------


def estimate(options: argparse.Namespace) -> None:
    """Tokens, work and memory of a run, without running it."""
    amount = Amount(options.preset, options.keep, settings(options))
    quiet(pipelines_too=True)
    transformer = meta_transformer(options.model)
    pipeline, distilled = pipeline_of(options.model)
    if pipeline is not None:
        pipeline.check_references(options.references)
    if options.steps is None:
        options.steps = 28 if pipeline is None else pipeline.steps(distilled)
    found = estimated(
        transformer,
        references=[options.reference_size] * options.references,
        output=options.output,
        text_tokens=options.text_tokens,
        steps=options.steps,
        config=amount.config(transformer, options.steps),
    )
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show(found.summary())


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
    """What is installed, and what is possible here; or what each backend of the ops does here."""
    if options.verify:
        if options.json:
            print(json.dumps(list(doctor.verify()), indent=2))
            return
        for line in doctor.verdict_lines():
            print(line, flush=True)
        return
    if options.json:
        print(json.dumps(doctor.diagnose(), indent=2))
    else:
        show(doctor.report())


# -- shared ----------------------------------------------------------------------------------


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a preset that were given, beside how much it keeps."""
    given = {name: value for name in ("task", "select") if (value := getattr(options, name)) is not None}
    return given | execution.settings(options)


def quiet(pipelines_too: bool) -> None:
    """Silence notes about optional parts that other libraries lack; diffusers may warn about a real model's call."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("transformers", "diffusers")[: 1 + pipelines_too]:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(f"{name}.utils.logging").set_verbosity_error()

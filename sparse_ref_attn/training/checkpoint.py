"""Checkpoints: whole or absent, and only of the model they were made for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..files import fits

__all__ = ["begin_from", "latest", "load", "save", "whole"]

_KEPT = 2  # checkpoints of a run
_PRETRAINED = "diffusion_pytorch_model"  # diffusers' name of a transformer's weights


@contextmanager
def whole(final: Path, what: str) -> Iterator[Path]:
    """A hidden folder to write into, which takes the place of `final` when everything in it is on the disk.

    Raises
    ------
    ConfigError
        If it cannot be written. What stood at `final` is then untouched.
    """
    partial = final.with_name(f".{final.name}")
    try:
        with fits(what, final.parent):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in partial.iterdir():
                _sync(file)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save(
    out: Path,
    step: int,
    weights: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Any,
    about: dict[str, Any],
) -> Path:
    """Write ``out/step-N``, whole or not at all.

    Parameters
    ----------
    out : Path
        The run's folder.
    step : int
        Steps done.
    weights, ema : mapping of str to Tensor
        The trained parameters and their moving average, if there is one.
    optimizer : object
        What ``torch.save`` takes and ``torch.load(weights_only=True)`` gives back.
    about : dict
        JSON types: the settings, the generators' states.

    Raises
    ------
    ConfigError
        If it cannot be written, on a full disk for example. Earlier checkpoints are untouched.
    """
    from safetensors.torch import save_file

    final = out / f"step-{step:06d}"
    with whole(final, f"the checkpoint of step {step}") as partial:
        for name, tensors in (("weights", weights), ("ema", ema)):
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial / f"{name}.safetensors")
        torch.save(optimizer, partial / "optimizer.pt")
        (partial / "about.json").write_text(json.dumps({"step": step, **about}, indent=2))
    for old in _all(out)[:-_KEPT]:
        shutil.rmtree(old)
    return final


def latest(out: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = _all(out)
    return found[-1] if found else None


def load(folder: Path, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """Copy a checkpoint into the tensors given; returns the optimizer's state and what was said about the run.

    Raises
    ------
    LayoutError
        If it is of a model with other parameters. The tensors are then untouched.
    ConfigError
        If a file of it is missing or damaged.
    """
    stored = [_read(folder, name) for name in ("weights", "ema")]
    try:
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        about = json.loads((folder / "about.json").read_text())
    except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
        raise ConfigError(f"{folder} must be a whole checkpoint, got: {error}") from error
    for ours, theirs in zip((weights, ema), stored, strict=True):
        _match(folder, theirs, ours)
    for ours, theirs in zip((weights, ema), stored, strict=True):
        _copy(theirs, ours)
    return optimizer, about


def begin_from(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Copy trained weights into the tensors given.

    Parameters
    ----------
    folder : Path
        A run's, whose newest checkpoint has the moving average, or a transformer's, as ``save_pretrained`` writes it.
    weights : mapping of str to Tensor

    Raises
    ------
    ConfigError
        If the folder is neither.
    LayoutError
        If it is of a model with other parameters.
    """
    found, name = latest(folder), "ema"
    if found is None and (folder / f"{_PRETRAINED}.safetensors").is_file():
        found, name = folder, _PRETRAINED
    if found is None:
        raise ConfigError(f"a run to begin from must have a checkpoint, or be a transformer's folder, got {folder}")
    stored = _read(found, name)
    _match(found, stored, weights)
    _copy(stored, weights)


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder} must be a whole checkpoint, got: {error}") from error


def _copy(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])


def _match(folder: Path, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    for name in sorted(set(theirs) | set(ours)):
        shapes = [str(tuple(side[name].shape)) if name in side else "nothing" for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise LayoutError(
                f"a checkpoint must have the model's own parameters: {name} of the model is {shapes[0]}, "
                f"that of {folder} is {shapes[1]}"
            )


def _all(out: Path) -> list[Path]:
    found = (path for path in out.glob("step-*") if (path / "about.json").exists())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

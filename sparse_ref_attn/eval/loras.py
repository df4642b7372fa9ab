"""LoRAs for a pipeline: looked at before the model is loaded, then added at a scale each."""

from __future__ import annotations

import importlib.util
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, VersionError

__all__ = ["Lora", "add_loras", "check_loras"]

_FILES = (".safetensors", ".bin", ".pt")
_MATRICES = ("lora", "lokr", "loha")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Lora:
    """One LoRA.

    Parameters
    ----------
    path : str
        A file, a folder that ``save_lora_weights`` or ``sra train`` wrote, or a hub id.
    scale : float
        Finite; 1 adds it as it was trained.
    """

    path: str
    scale: float = 1.0

    @property
    def file(self) -> Path | None:
        """The file on this disk; None for a hub id.

        Raises
        ------
        ConfigError
            If there is none, it is named like another kind of file, or a folder has several.
        """
        path = Path(self.path).expanduser()
        if path.is_dir():
            usual = path / "pytorch_lora_weights.safetensors"
            found = [usual] if usual.is_file() else sorted(path.glob("*.safetensors"))
            if len(found) != 1:
                names = ", ".join(file.name for file in found) or "none"
                raise ConfigError(f"a LoRA's folder must hold one .safetensors file, got {path} with {names}")
            return found[0]
        if path.is_file() and path.suffix in _FILES:
            return path
        if path.is_file():
            raise ConfigError(f"a LoRA's file must end in {', '.join(_FILES)}, got {path}")
        if _HUB_ID.fullmatch(self.path) and not self.path.startswith(".") and path.suffix not in _FILES:
            return None
        raise ConfigError(f"a LoRA must be a file, a folder or a hub id, got {self.path}, which does not exist")


def check_loras(loras: Sequence[Lora]) -> None:
    """Raise for what can be no LoRA, without a model.

    Raises
    ------
    ConfigError
        For a scale that is not finite, a file that does not exist, cannot be read, or holds no LoRA.
    VersionError
        If peft is not installed.
    """
    if loras and importlib.util.find_spec("peft") is None:
        raise VersionError("LoRA needs peft: pip install 'sparse-ref-attn[train]'")
    for lora in loras:
        if not math.isfinite(lora.scale):
            raise ConfigError(f"the scale of a LoRA must be a finite number, got {lora.scale} for {lora.path}")
        file = lora.file
        if file is not None and file.suffix == ".safetensors":
            _check_file(file)


def add_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Load them all, each at its scale.

    Parameters
    ----------
    pipe : diffusers pipeline
        Changed in place: ``pipe.load_lora_weights`` and ``pipe.set_adapters``.
    loras : sequence of Lora

    Raises
    ------
    ConfigError
        If the pipeline takes no LoRA, or one is not for its transformer.
    """
    if not loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise ConfigError(f"a LoRA needs a pipeline that loads one, got {type(pipe).__name__}")
    names = [f"lora_{number}" for number in range(1, len(loras) + 1)]
    for name, lora in zip(names, loras, strict=True):
        file = lora.file
        place = (lora.path, {}) if file is None else (str(file.parent), {"weight_name": file.name})
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # said of every LoRA but the first
                pipe.load_lora_weights(place[0], adapter_name=name, **place[1])
        except MemoryError:
            raise
        except Exception as error:  # whatever a file for another model makes of it
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ConfigError(
                f"a LoRA must be one that {type(pipe).__name__} can load, got {lora.path}: {type(error).__name__}: "
                f"{reason}"
            ) from error
        if name not in pipe.get_list_adapters().get("transformer", ()):
            raise ConfigError(
                f"a LoRA must have weights for the transformer of {type(pipe).__name__}, got {lora.path} without any"
            )
    pipe.set_adapters(names, [lora.scale for lora in loras])


def _check_file(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"a LoRA must be a readable safetensors file, got {file}: {error}") from error
    if not any(word in key.lower() for key in keys for word in _MATRICES):
        held = f"{len(keys)} tensors such as {keys[0]}" if keys else "no tensors"
        raise ConfigError(f"a LoRA's file must hold LoRA matrices, got {file} with {held}")

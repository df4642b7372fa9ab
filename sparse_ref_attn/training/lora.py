"""LoRA: added before training, and written where any loader finds it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ..adapters.training_hooks import TrainingHooks
from ..errors import ConfigError, VersionError
from ..files import fits
from .isolate_references import IsolateReferences, said_of
from .random_drop import RandomDrop

__all__ = ["add_lora", "save_lora"]


def add_lora(transformer: Any, rank: int, targets: Sequence[str] = TrainingHooks.lora) -> None:
    """Freeze the transformer and add trainable float32 LoRA matrices, by default to its attention.

    Parameters
    ----------
    transformer : diffusers.ModelMixin
        Changed in place.
    rank : int
        Of the matrices, at least 1; their scale is 1.
    targets : sequence of str
        Ends of the names of the Linear layers that get them.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise VersionError("LoRA needs peft: pip install 'sparse-ref-attn[train]'") from error
    if rank < 1:
        raise ConfigError(f"the rank of a LoRA must be at least 1, got {rank}")
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
    )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_lora(
    pipe: Any, folder: Path, weights: Mapping[str, Tensor], drop: RandomDrop | IsolateReferences | None
) -> Path:
    """Write trained LoRA matrices for ``pipe.load_lora_weights``, or for ``pipe.transformer.load_lora_adapter`` where a
    pipeline has none (LongCat-Image-Edit's).

    The file's metadata have a JSON text under ``sparse_ref_attn``: the `RandomDrop` and the `IsolateReferences` it was
    trained with (see `said_of`).

    Parameters
    ----------
    pipe : diffusers pipeline
        Whose transformer has the LoRA.
    folder : Path
        Gets ``pytorch_lora_weights.safetensors``.
    weights : mapping of str to Tensor
        Parameter name to value, such as the moving average.
    drop : RandomDrop, IsolateReferences or None

    Raises
    ------
    ConfigError
        If it cannot be written, on a full disk for example. An earlier file is then untouched.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    name = "pytorch_lora_weights.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    layers = get_peft_model_state_dict(pipe.transformer, state_dict=state)
    with fits("the LoRA", folder), TemporaryDirectory(dir=folder) as hidden:
        if hasattr(pipe, "save_lora_weights"):
            pipe.save_lora_weights(
                hidden,
                transformer_lora_layers=layers,
                transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
            )
            with safe_open(Path(hidden) / name, framework="pt") as file:
                metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        else:
            metadata, tensors = {"format": "pt"}, {f"transformer.{key}": x.contiguous() for key, x in layers.items()}
        metadata["sparse_ref_attn"] = json.dumps(said_of(drop))
        partial = Path(hidden) / "with_metadata"
        save_file(tensors, partial, metadata)
        return partial.replace(folder / name)

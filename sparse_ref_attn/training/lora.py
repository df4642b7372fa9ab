"""LoRA: added before training, and written where any loader finds it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.training_hooks import TrainingHooks
from ..errors import ConfigError, VersionError
from ..files import fits, replacing
from ..patching.trained import MARK
from .isolate_references import IsolateReferences, said_of
from .random_drop import RandomDrop

__all__ = ["add_lora", "lora_metadata", "save_lora"]


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


def lora_metadata(transformer: Any, said: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of a LoRA's file: its peft configuration as diffusers keeps it, and what its training is to say.

    `said` stands under ``sparse_ref_attn`` as a JSON text, for any reader. The configuration, of which diffusers makes
    peft's when it loads the file, carries it too: so `patch` finds it on the transformer.

    Parameters
    ----------
    transformer : diffusers.ModelMixin
        With one LoRA, named "default".
    said : mapping
        JSON types; see `said_of`.
    """
    config = transformer.peft_config["default"].to_dict() | {"auto_mapping": {MARK: said}}
    kept = {f"transformer.{name}": value for name, value in config.items()}
    return {
        "format": "pt",
        MARK: json.dumps(said),
        "lora_adapter_metadata": json.dumps(kept, default=sorted, sort_keys=True),
    }


def save_lora(
    pipe: Any, folder: Path, weights: Mapping[str, Tensor], drop: RandomDrop | IsolateReferences | None
) -> Path:
    """Write trained LoRA matrices for ``pipe.load_lora_weights``, or for ``pipe.transformer.load_lora_adapter`` where a
    pipeline has none (LongCat-Image-Edit's).

    The file says what it was trained with, see `lora_metadata`.

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
    from safetensors.torch import save_file

    layers = get_peft_model_state_dict(pipe.transformer, state_dict=dict(weights))
    tensors = {f"transformer.{name}": x.detach().cpu().contiguous() for name, x in layers.items()}
    path = folder / "pytorch_lora_weights.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft, fits("the LoRA", folder):
        save_file(tensors, draft, lora_metadata(pipe.transformer, said_of(drop)))
    return path

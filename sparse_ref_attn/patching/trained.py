"""What is said beside a model's weights of how they were trained: whether its references run by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.alone import check_alone
from ..adapters.base import Adapter
from ..errors import ConfigError, IncompatibleError
from ..execution import Cache, Execution
from ..hooks.diffusers import weights_folder
from ..isolation import Isolation

__all__ = ["BESIDE", "isolation_of", "told"]

BESIDE = "sparse_ref_attn.json"
"""The file beside a transformer's weights."""
_KEY = "isolate"


def told(folder: str | Path) -> dict[str, Any]:
    """What is said beside the weights in a folder; empty where nothing is.

    Raises
    ------
    ConfigError
        If the file is not what ``sra train`` writes.
    """
    path = Path(folder) / BESIDE
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError(f"a {type(said).__name__}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a JSON object, as sra train writes it, got {error}") from error
    return said


def isolation_of(execute: Execution, transformer: nn.Module, adapter: Adapter) -> Isolation | None:
    """How the references of a run are to run by themselves; None where they run with the picture.

    Raises
    ------
    IncompatibleError
        If the weights say that they were trained otherwise, or the model's references cannot run by themselves.
    ConfigError
        If what they say cannot be read.
    """
    if adapter.cache is not None and adapter.cache.kept_by(transformer):
        return None  # it does so without help
    folder = weights_folder(transformer)
    said = {} if folder is None else told(folder)
    own = Isolation.from_dict(_without_drop(said[_KEY])) if said.get(_KEY) is not None else None
    wanted = execute.isolated if isinstance(execute, Cache) else False
    if own is not None and wanted is False:
        raise IncompatibleError(
            f"the weights in {folder} were trained with references that run by themselves ({own}): use "
            f"execute=Cache() or Cache(isolated=True), or a preset with a cache, got {execute}"
        )
    if wanted is None or wanted is False:
        if own is not None and isinstance(execute, Cache):
            Cache(execute.first, per=execute.per, isolated=own)  # raises where it cannot be
        return own
    if _KEY in said and own is None:
        raise IncompatibleError(
            f"the weights in {folder} were trained with references that see the picture ({BESIDE} there says so): "
            f"isolated must be None or False, got {wanted}"
        )
    check_alone(adapter)
    if isinstance(wanted, Isolation) and own is not None and wanted != own:
        raise IncompatibleError(f"the weights in {folder} were trained with {own}, got isolated={wanted}")
    return own or (wanted if isinstance(wanted, Isolation) else Isolation())


def _without_drop(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "drop"}

"""What is said with a model's weights of how they were trained: whether its references run by themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.alone import check_alone
from ..adapters.base import Adapter
from ..errors import ConfigError, IncompatibleError
from ..execution import Cache, Execution
from ..hooks.diffusers import applied_loras, weights_folder
from ..isolation import Isolation

__all__ = ["BESIDE", "MARK", "check_unchanged", "isolation_of", "told"]

BESIDE = "sparse_ref_attn.json"
"""The file beside a transformer's weights."""
MARK = "sparse_ref_attn"
"""The same in a LoRA: the key in its file's metadata, and in ``auto_mapping`` of its peft configuration, which loaders
keep."""
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
    who, said = _said(transformer)
    own = _isolation(said)
    wanted = execute.isolated if isinstance(execute, Cache) else False
    if own is not None and wanted is False:
        raise IncompatibleError(
            f"{who} were trained with references that run by themselves ({own}): use "
            f"execute=Cache() or Cache(isolated=True), or a preset with a cache, got {execute}"
        )
    if wanted is None or wanted is False:
        if own is not None and isinstance(execute, Cache):
            Cache(execute.first, per=execute.per, isolated=own)  # raises where it cannot be
        return own
    if _KEY in said and own is None:
        raise IncompatibleError(
            f"{who} were trained with references that see the picture, as is said with them: "
            f"isolated must be None or False, got {wanted}"
        )
    check_alone(adapter)
    if isinstance(wanted, Isolation) and own is not None and wanted != own:
        raise IncompatibleError(f"{who} were trained with {own}, got isolated={wanted}")
    return own or (wanted if isinstance(wanted, Isolation) else Isolation())


def check_unchanged(isolation: Isolation | None, execute: Execution, transformer: nn.Module, adapter: Adapter) -> None:
    """Raise, as `isolation_of`, where LoRAs that came or went since the patch make it another `isolation`."""
    now = isolation_of(execute, transformer, adapter)
    if now != isolation:
        ways = [f"with {how}" if how else "with the picture" for how in (isolation, now)]
        raise IncompatibleError(
            "a LoRA was put on or taken off since the patch: patch again, for references that run "
            f"{ways[1]}, got them {ways[0]}"
        )


def _said(transformer: nn.Module) -> tuple[str, Mapping[str, Any]]:
    """Whose weights say something, and what: the LoRAs, which were trained last, else those that they were put on."""
    found = {}
    for name, config in applied_loras(transformer).items():
        said = (getattr(config, "auto_mapping", None) or {}).get(MARK, {})
        if _KEY in said:
            found[f"the weights of the LoRA {name!r}"] = said
    if len({_isolation(said) for said in found.values()}) > 1:
        words = "; ".join(f"{who}: {_isolation(said) or 'with the picture'}" for who, said in found.items())
        raise IncompatibleError(f"LoRAs that are applied together must have been trained alike, got {words}")
    folder = weights_folder(transformer)
    own = {} if found or folder is None else {f"the weights in {folder}": told(folder)}
    return next(iter((found or own).items()), ("", {}))


def _isolation(said: Mapping[str, Any]) -> Isolation | None:
    return None if said.get(_KEY) is None else Isolation.from_dict(said[_KEY])

"""What a patch may touch, noted down: equal snapshots mean that nothing was left behind."""

from __future__ import annotations

import gc
from typing import Any

import torch
from diffusers.models import attention_dispatch

import sparse_ref_attn as sra
from sparse_ref_attn import schedules

GRID = sra.SparseRef("grid", 0.3)
"""Sparse from the first step."""
MASS = sra.SparseRef("mass", schedules.Linear(0.2, 0.8))
"""Step 0 is profiled, then another number of tokens at every step."""
ALL = sra.SparseRef("mass", 1.0)
"""Profiles, and keeps every token."""

OWN_SCRATCH = {"_conv_idx", "_feat_map", "_enc_conv_idx", "_enc_feat_map", "rope_deltas"}
"""What a VAE of video, and Qwen3-VL, change at every call of their own."""


def steps(handle: sra.PatchHandle) -> list[tuple[str, int]]:
    """Kind and kept tokens of each step of the last run."""
    return [(step.kind, step.kept) for step in handle.record.steps]


def kinds(handle: sra.PatchHandle) -> list[str]:
    return [step.kind for step in handle.record.steps]


class Same:
    """Equal to the very same object only; keeps it alive, so that identities are not used twice."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} at {id(self.value):x}"


def _attributes(thing: Any) -> dict[str, Any]:
    """Attributes by identity, one level into dictionaries and sets (hooks, parameters, submodules)."""
    out: dict[str, Any] = {}
    for name, value in vars(thing).items():
        if name in OWN_SCRATCH:
            continue
        if isinstance(value, dict):
            out[name] = {key: Same(entry) for key, entry in value.items()}
        else:
            out[name] = set(value) if isinstance(value, set) else Same(value)
    return out


def state(pipe: Any) -> dict[str, Any]:
    """Every module's and attention processor's attributes, the scheduler's, and diffusers' table of backends.

    Pipelines of earlier tests are collected first: what they leave in the table goes with them.
    """
    gc.collect()
    registry, names = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName
    tables = ("_backends", "_constraints", "_supported_arg_names", "_supports_context_parallel", "_active_backend")
    out: dict[str, Any] = {name: type(getattr(registry, name))(getattr(registry, name)) for name in tables}
    out["enum"] = (list(names.__members__.items()), list(names._value2member_map_))
    out["global hooks"] = [
        dict(getattr(torch.nn.modules.module, name)) for name in ("_global_forward_pre_hooks", "_global_forward_hooks")
    ]
    for component, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            for path, module in model.named_modules():
                out[f"{component} {path}"] = _attributes(module)
                if hasattr(module, "processor"):
                    out[f"{component} {path} processor"] = _attributes(module.processor)
    return out

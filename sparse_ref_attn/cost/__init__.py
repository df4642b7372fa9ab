"""What a step costs: FLOPs, bytes, memory, and the time no run can beat, from token counts alone.

Everything here is arithmetic on the shapes of the model's Linear layers, so it works on meta-device and quantised
models and needs no run.
"""

from __future__ import annotations

from .flops import Flops, bound_seconds, layered_flops, run_flops, scoring_flops, step_flops
from .memory import Memory, reference_kv_bytes, room_bytes, step_memory, tile_bytes
from .shape import ModelShape
from .tokens import StepTokens

__all__ = [
    "Flops",
    "Memory",
    "ModelShape",
    "StepTokens",
    "bound_seconds",
    "layered_flops",
    "reference_kv_bytes",
    "room_bytes",
    "run_flops",
    "scoring_flops",
    "step_flops",
    "step_memory",
    "tile_bytes",
]

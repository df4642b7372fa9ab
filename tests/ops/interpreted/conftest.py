"""These files launch Triton kernels on CPU tensors: collected only where interpreted (`tests/ops/interp.py`)."""

from __future__ import annotations

import os
import sys

if os.environ.get("TRITON_INTERPRET") == "1":
    for unused in ("peft", "torchao"):
        sys.modules[unused] = None  # diffusers and transformers import what they find
    from ..interp import mend_bf16, patch_once, remember_operands, remember_types, spare

    mend_bf16()
    patch_once()
    spare()
    remember_types()
    remember_operands()
else:
    collect_ignore_glob = ["*"]

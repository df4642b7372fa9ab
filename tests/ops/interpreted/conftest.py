"""These files launch Triton kernels on CPU tensors: collected only where interpreted (`tests/ops/interp.py`)."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from ..interp import mend_bf16, patch_once, remember_operands, remember_types, spare

    mend_bf16()
    patch_once()
    spare()
    remember_types()
    remember_operands()
else:
    collect_ignore_glob = ["*"]

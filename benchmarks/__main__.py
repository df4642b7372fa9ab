"""``python -m benchmarks``."""

from __future__ import annotations

import sys

from sparse_ref_attn.errors import SparseRefError

from .cli import main

try:
    sys.exit(main())
except SparseRefError as error:
    sys.exit(f"benchmarks: error: {error}")

"""The row copies in Triton, interpreted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sparse_ref_attn.ops.pack_rows.impl.triton_rows import launch_pack, launch_unpack

from ..row_copies import RowCopies


class TestInterpreted(RowCopies):
    backend = "triton"
    pack = staticmethod(launch_pack)
    unpack = staticmethod(launch_unpack)

    def running(self, seed: int = 1) -> AbstractContextManager[Any]:
        return nullcontext()

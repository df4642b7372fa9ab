"""The row copies of csrc, emulated."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from sparse_ref_attn.errors import KernelError
from sparse_ref_attn.ops.pack_rows.impl.cuda import launch_pack, launch_unpack

from ..ops.row_copies import DTYPES, RowCopies, draw
from .emulated import emulated, shipped


class TestEmulated(RowCopies):
    backend = "cuda"
    pack = staticmethod(launch_pack)
    unpack = staticmethod(launch_unpack)

    def running(self, seed: int = 1) -> AbstractContextManager[Any]:
        return emulated(shipped(), seed=seed)

    def test_more_tensors_than_one_launch_takes(self) -> None:
        shapes = [(2, 9, n, 1 + n % 3) for n in range(1, 40)]
        x = [draw(shape, DTYPES[n % len(DTYPES)]) for n, shape in enumerate(shapes)]
        self.both_ways(x, torch.tensor([8, 1, 4]), 1)


def test_a_row_named_twice_is_a_race() -> None:
    """Two threads write one place: rows must be distinct, and the emulator tells."""
    with emulated(shipped()), pytest.raises(KernelError, match=r"race: global memory at .* is written"):
        launch_unpack([torch.ones(1, 3, 16)], torch.tensor([1, 2, 1]), 4, 1)


def test_16_bytes_at_a_time_where_the_layout_allows_it() -> None:
    x = draw((2, 9, 64), torch.float16)
    with emulated(shipped()) as library:
        launch_pack([x], torch.tensor([1, 5, 7]), 1)
        assert library.count("global bytes read") == 6 * 128 + 8 * 6 * 8  # each thread reads its row number

"""A Klein-KV pipeline whose cached step reads the reference K/V by index, through the interpreted kernels."""

from __future__ import annotations

import pytest
import torch

from .. import klein_kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cached_step_by_index(dtype: torch.dtype) -> None:
    klein_kv.check_step("triton", dtype)


def test_the_picture() -> None:
    klein_kv.check_picture("triton")

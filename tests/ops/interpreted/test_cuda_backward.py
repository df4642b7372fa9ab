"""A forward by the CUDA kernel, emulated, and the backward by the interpreted Triton kernels."""

from __future__ import annotations

import torch

from ...cuda.emulated import emulated, shipped
from ..problems import gradients, make, truth
from ..tolerance import assert_as_accurate


def test_gradients_after_a_forward_by_the_emulator() -> None:
    rounded = make(((33, 3),), ((34, 2),), (5, 20), 30, heads=1, channels=64).to(torch.float16)
    exact = rounded.to(torch.float64).leaves()
    want = gradients(exact, *truth(exact))
    plain, ours = rounded.leaves(), rounded.leaves()
    with emulated(shipped()):
        low, got = gradients(plain, *plain.run("reference")), gradients(ours, *ours.run("cuda"))
    for name in want:
        assert_as_accurate(got[name], want[name], low[name], name)

"""Counts what waits for the device: every time a tensor's numbers are asked for on the host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["device_reads"]

READS = ("tolist", "item", "__int__", "__index__", "__float__", "__bool__", "cpu", "numpy", "nonzero", "unique")
# Checks of values that these make on a CPU alone, where nobody waits for them.
ON_A_CPU = {"check_values", "_check_values", "_add_masses"}


@contextmanager
def device_reads(inside: str = "") -> Iterator[list[str]]:
    """Inside, the places (file:function) that read a tensor's numbers, with a function named `inside` above them.

    It looks at the public methods of Tensor, so at calls made in Python, those of the ops' implementations too.
    """
    found: list[str] = []

    def counting(name: str) -> Any:
        real = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            frames, frame = [], sys._getframe(1)
            while frame is not None:
                frames.append(frame.f_code)
                frame = frame.f_back  # type: ignore[assignment]
            above = [code.co_name for code in frames]
            library = next((c for c in frames if "sparse_ref_attn" in c.co_filename and c.co_name[0] != "<"), frames[0])
            if not ON_A_CPU & {library.co_name} and (not inside or inside in above):
                found.append(f"{Path(library.co_filename).name}:{library.co_name} {name}")
            return real(self, *args, **kwargs)

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, counting(name))
        yield found

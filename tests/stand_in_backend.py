"""A backend of every op that notes who calls it, lets plain PyTorch compute, and can be made wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.ops import verdicts
from sparse_ref_attn.ops.attention_mass import backends as mass_backends
from sparse_ref_attn.ops.attention_mass import trial as mass_trial
from sparse_ref_attn.ops.attention_mass.impl.chunked import attention_mass_chunked
from sparse_ref_attn.ops.gather_attention import backends as attention_backends
from sparse_ref_attn.ops.gather_attention import trial as attention_trial
from sparse_ref_attn.ops.gather_attention.impl import sdpa
from sparse_ref_attn.ops.pack_rows import backends as rows_backends
from sparse_ref_attn.ops.pack_rows import trial as rows_trial
from sparse_ref_attn.ops.pack_rows.reference import pack_reference, unpack_reference

__all__ = ["calls", "judged", "spoiled"]

calls: list[tuple[str, Any]] = []
"""What reached the stand-in: the function, and a word on the call."""
spoiled: dict[str, Callable[[Any], Any]] = {}
"""How a function's result is made wrong."""


def _give(name: str, about: Any, result: Any) -> Any:
    calls.append((name, about))
    return spoiled.get(name, lambda x: x)(result)


def forward(a: Any) -> tuple[Tensor, Tensor]:
    return _give("forward", a, sdpa.forward(a))


def backward(a: Any, *given: Any) -> Any:
    return _give("backward", a, sdpa.backward(a, *given))


def launch_pack(tensors: Sequence[Tensor], rows: Tensor, dim: int) -> list[Tensor]:
    return _give("pack", rows, [pack_reference(x, rows, dim) for x in tensors])


def launch_unpack(packed: Sequence[Tensor], rows: Tensor, size: int, dim: int) -> list[Tensor]:
    return _give("unpack", rows, [unpack_reference(y, rows, size, dim) for y in packed])


def _launchers(q: Tensor) -> mass_backends.Launchers:
    def launch_lse(q: Tensor, k: Tensor, scale: float, stride: int, key_mask: Tensor | None = None) -> Tensor:
        scores = torch.einsum("bnhc,bshc->bhns", q.float(), k.float()) * scale
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
        return _give("lse", q, scores.logsumexp(-1))

    def launch_mass(
        q: Tensor, k: Tensor, lse: Tensor, scale: float, stride: int, key_mask: Tensor | None = None
    ) -> Tensor:
        some, pivots = q[:, ::stride], lse[..., ::stride].contiguous()
        return _give("mass", q, attention_mass_chunked(some, k, (0, k.shape[1]), scale, key_mask, pivots))

    def launch_tile_mass(
        q: Tensor, k: Tensor, lse: Tensor, tiles: Tensor, scale: float, reduced: bool, key_mask: Tensor | None = None
    ) -> Tensor:
        span, cut = (0, k.shape[1]), tiles.tolist()
        return _give("tile_mass", q, attention_mass_chunked(q, k, span, scale, key_mask, lse, cut, reduced))

    return mass_backends.Launchers(launch_lse, launch_mass, launch_tile_mass)


@contextmanager
def judged(folder: Path, candidates: tuple[str, ...] = ("stand_in",)) -> Iterator[None]:
    """Inside, "auto" on a CPU goes by verdicts, kept in `folder`, among these backends and none else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setitem(attention_backends.PREDICATES, "stand_in", lambda call: [])
        patch.setitem(attention_backends.MODULES, "stand_in", __name__)
        patch.setitem(mass_backends.PREDICATES, "stand_in", lambda q, k, scale, tiled: [])
        patch.setitem(mass_backends.LAUNCHERS, "stand_in", _launchers)
        patch.setitem(rows_backends.PREDICATES, "stand_in", lambda tensors, rows, dim: [])
        patch.setitem(rows_backends.MODULES, "stand_in", __name__)
        for trial, plain in ((attention_trial, "sdpa"), (mass_trial, "chunked"), (rows_trial, "reference")):
            names = tuple(plain if name == "plain" else name for name in candidates)
            patch.setitem(trial.CANDIDATES, "cpu", names)
        verdicts.forget()
        calls.clear()
        spoiled.clear()
        verdicts.JUDGED.add("cpu")
        try:
            yield
        finally:
            verdicts.JUDGED.discard("cpu")
            verdicts.forget()
            spoiled.clear()

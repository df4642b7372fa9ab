"""How the backends of pack_rows and unpack_rows are compared and timed for a verdict. They copy, so bits must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..verdicts import Kind, size_class
from ..verdicts.judge import Compared
from .backends import PREDICATES
from .reference import pack_reference, unpack_reference
from .registered import pack_by, unpack_by

__all__ = ["CANDIDATES", "against", "candidates", "kind_of", "sized", "small"]

# What "auto" may take, by device; the order decides a tie.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "cuda": ("reference", "triton", "cuda"),
    "cpu": ("reference",),
}


def kind_of(form: str, tensors: Sequence[Tensor], rows: int, kept: int, dim: int) -> Kind:
    """The kind of a call: `form` is "pack" or "unpack", `rows` those of the full tensors along `dim`."""
    first = tensors[0]
    width = sum(t.numel() * t.element_size() // max(t.shape[dim], 1) for t in tensors)
    size = (size_class(rows), size_class(kept), size_class(width))
    return Kind("pack_rows", form, first.device, first.dtype, several=len(tensors) > 1, size=size)


def candidates(kind: Kind) -> Sequence[str]:
    """Names of the backends, in the order that decides a tie."""
    return CANDIDATES.get(kind.device.type, CANDIDATES["cpu"])


def against(kind: Kind, backend: str) -> list[str]:
    """Why a backend cannot do a call of this kind."""
    return PREDICATES[backend]([torch.empty(1, 1, 16, dtype=kind.dtype, device=kind.device)], _rows(kind, 1, 1), 1)


def small(kind: Kind) -> Callable[[str], Iterator[Compared]]:
    """One tensor or two, of other widths and batches, odd numbers of rows, out of order."""
    shapes = [(2, 133, 3, 17), (1, 133, 5)] if kind.several else [(2, 133, 3, 17)]
    rows, tensors = _rows(kind, 133, 70), [_tensor(kind, shape) for shape in shapes]

    def run(backend: str) -> Iterator[Compared]:
        if kind.form == "pack":
            wanted = [pack_reference(x, rows, 1) for x in tensors]
            got = pack_by(backend, tensors, rows, 1)
        else:
            packed = [x[:, :70].contiguous() for x in tensors]
            wanted = [unpack_reference(y, rows, 133, 1) for y in packed]
            got = unpack_by(backend, packed, rows, 133, 1)
        for actual, exact in zip(got, wanted, strict=True):
            same = torch.tensor([float(torch.equal(actual, exact))], dtype=torch.float64)
            yield "rows (1 where every bit agrees)", same, torch.ones_like(same), torch.ones_like(same)

    return run


def sized(kind: Kind) -> Callable[[str], Callable[[], object]]:
    """One tensor of the class's size, or two halves."""
    size, kept, width = kind.size
    count = 1 + kind.several
    channels = max(1, width // count // kind.dtype.itemsize)
    rows = _rows(kind, size, min(kept, size))
    length = size if kind.form == "pack" else rows.shape[0]
    tensors = [_tensor(kind, (1, length, channels)) for _ in range(count)]

    def prepare(backend: str) -> Callable[[], object]:
        if kind.form == "pack":
            return lambda: pack_by(backend, tensors, rows, 1)
        return lambda: unpack_by(backend, tensors, rows, size, 1)

    return prepare


def _rows(kind: Kind, size: int, kept: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:kept].to(kind.device)


def _tensor(kind: Kind, shape: tuple[int, ...]) -> Tensor:
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(kind.device, kind.dtype)

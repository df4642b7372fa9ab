"""Networks in ONNX written by hand, in the format's own bytes (protocol buffers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

FLOAT, INTS = 1, 7  # the format's numbers of types


def varint(value: int) -> bytes:
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def node(kind: str, inputs: Sequence[str], output: str, **ints: Sequence[int]) -> bytes:
    """One with attributes that are lists of whole numbers."""
    attributes = [
        field(5, field(1, name) + b"".join(field(8, i) for i in values) + field(20, INTS))
        for name, values in ints.items()
    ]
    return b"".join([*(field(1, name) for name in inputs), field(2, output), field(4, kind), *attributes])


def info(name: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(field(1, field(1, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, FLOAT) + field(2, dims)))


def save_network(
    path: Path, nodes: Sequence[bytes], given: tuple[int, ...], outputs: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """A network with the input "data"."""
    held = [
        b"".join(field(1, size) for size in value.shape)
        + field(2, FLOAT) + field(8, name) + field(9, value.astype("<f4").tobytes())
        for name, value in (constants or {}).items()
    ]  # fmt: skip
    graph = [*(field(1, one) for one in nodes), field(2, "by hand"), *(field(5, one) for one in held)]
    graph += [field(11, info("data", given)), *(field(12, info(name, shape)) for name, shape in outputs.items())]
    path.write_bytes(field(1, 8) + field(7, b"".join(graph)) + field(8, field(2, 13)))

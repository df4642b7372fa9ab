"""What the entry points of csrc refuse, before anything is launched: a code, and a sentence with what was got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.kernels import abi

from .emulated import Emulated, shipped

X = torch.zeros(4096, dtype=torch.float16)
AT = X.data_ptr()
Change = Callable[[Any], None]


def tensor(at: int = AT, item: int = 0, row: int = 64, head: int = 64) -> abi.Tensor:
    return abi.Tensor(at, item, row, head)


def attention() -> abi.GatherAttentionArgs:
    return abi.GatherAttentionArgs(
        dtype=0, channels=64, heads=4, key_heads=2, items=1, query_parts=1, dense_parts=1, selections=1, queries=5,
        scale=1.0, q=tensor(), k=tensor(), v=tensor(), k_ref=tensor(), v_ref=tensor(), out=tensor(), lse=AT,
        cu_seqlens_q=abi.Index(AT, 4), cu_seqlens_k=abi.Index(AT, 4), ref_indices=abi.Index(AT, 8),
        ref_offsets=abi.Index(AT, 4),
    )  # fmt: skip


def lse() -> abi.AttentionLseArgs:
    return abi.AttentionLseArgs(
        dtype=1, channels=128, heads=2, items=1, queries=5, keys=6, query_stride=1, scale=1.0,
        q=tensor(), k=tensor(), lse=tensor(),
    )  # fmt: skip


def mass() -> abi.AttentionMassArgs:
    return abi.AttentionMassArgs(
        dtype=1, channels=128, heads=2, items=1, queries=5, refs=6, query_stride=1, scale=1.0,
        q=tensor(), k=tensor(), lse=tensor(), mass=tensor(),
    )  # fmt: skip


def rows() -> abi.RowsArgs:
    copy = abi.RowCopy(full=AT, packed=AT, bytes=16, full_row=16, packed_row=16, axes=1, sizes=(2, 0, 0, 0))
    return abi.RowsArgs(copies=(abi.RowCopy * 1)(copy), count=1, row=abi.Index(AT, 8), rows=2, size=5)


def put(path: str, value: Any) -> Change:
    def change(arguments: Any) -> None:
        *parents, last = path.split(".")
        for name in parents:
            arguments = arguments[int(name)] if name.isdigit() else getattr(arguments, name)
        setattr(arguments, last, value)

    return change


CASES = {
    "sra_gather_attention": (
        attention,
        [
            ("q.data", None, LayoutError, "q must be given, got NULL"),
            ("out.data", None, LayoutError, "out must be given, got NULL"),
            ("cu_seqlens_q.data", None, LayoutError, "cu_seqlens_q must be given"),
            ("ref_offsets.data", None, LayoutError, "ref_offsets must be given"),
            ("cu_seqlens_k.bytes", 2, ConfigError, "cu_seqlens_k must hold integers of 4 or 8 bytes, got 2"),
            ("ref_indices.data", AT + 4, LayoutError, "ref_indices must lie at a multiple of its integers' 8 bytes"),
            ("k.row", 60, LayoutError, "strides of k must be multiples of 8 elements, got item 0, row 60, head 64"),
            ("v_ref.head", 4, LayoutError, "strides of v_ref must be multiples of 8 elements"),
            ("v.data", AT + 2, LayoutError, "v must lie at a multiple of 16 bytes"),
            ("lse", AT + 2, LayoutError, "lse must lie at a multiple of 4 bytes"),
            ("dtype", 2, ConfigError, r"dtype must be SRA_FLOAT16 \(0\) or SRA_BFLOAT16 \(1\), got 2"),
            ("channels", 96, ConfigError, "channels must be 64 or 128, got 96"),
            ("scale", 0.0, ConfigError, "scale must be positive and finite, got 0"),
            ("scale", float("nan"), ConfigError, "scale must be positive and finite, got"),
            ("scale", float("inf"), ConfigError, "scale must be positive and finite, got inf"),
            ("heads", 65536, LayoutError, "heads must lie between 1 and 65535, got 65536"),
            ("heads", 3, LayoutError, "heads must be a multiple of key_heads, got 3 and 2"),
            ("key_heads", 0, LayoutError, "key_heads must lie between 1 and 4, got 0"),
            ("items", 0, LayoutError, "items must lie between 1 and"),
            ("query_parts", 3, LayoutError, "query_parts must lie between 1 and 2, got 3"),
            ("dense_parts", -1, LayoutError, "dense_parts must lie between 0 and 2, got -1"),
            ("dense_parts", 2, LayoutError, "strides|must be given", "k2.row", 3),
            ("selections", 3, LayoutError, r"selections must be 0, 1 or key_heads \(2\), got 3"),
            ("selections", 0, LayoutError, "there must be keys", "dense_parts", 0),
            ("queries", -1, LayoutError, "queries must lie between 0 and"),
        ],
    ),
    "sra_attention_lse": (
        lse,
        [
            ("q.data", None, LayoutError, "q must be given"),
            ("lse.data", None, LayoutError, "lse must be given"),
            ("k.item", 12, LayoutError, "strides of k must be multiples of 8 elements, got item 12"),
            ("query_stride", 0, LayoutError, "query_stride must lie between 1 and"),
            ("keys", -1, LayoutError, "keys must lie between 0 and"),
            ("items", 65536, LayoutError, "items must lie between 0 and 65535, got 65536"),
            ("cu_seqlens_q", AT, LayoutError, "cu_seqlens_k must be given"),
            ("cu_seqlens_k", AT, LayoutError, "cu_seqlens_k must come with cu_seqlens_q"),
            ("cu_seqlens_q", AT, ConfigError, "key_mask must be NULL with offsets", "key_mask.data", AT),
        ],
    ),
    "sra_attention_mass": (
        mass,
        [
            ("mass.data", None, LayoutError, "mass must be given"),
            ("lse.data", AT + 1, LayoutError, "lse must lie at a multiple of 4 bytes"),
            ("mean.data", AT + 1, LayoutError, "mean must lie at a multiple of 4 bytes"),
            ("value.data", AT + 8, LayoutError, "value must lie at a multiple of 16 bytes"),
            ("channels", 32, ConfigError, "channels must be 64 or 128, got 32"),
            ("refs", -2, LayoutError, "refs must lie between 0 and"),
            ("ref_starts", AT, LayoutError, "ref_starts must come with cu_seqlens_q"),
        ],
    ),
    "sra_pack_rows": (
        rows,
        [
            ("copies", None, LayoutError, "copies must be given"),
            ("copies.0.full", None, LayoutError, "full must be given"),
            ("copies.0.packed", None, LayoutError, "packed must be given"),
            ("copies.0.axes", 5, LayoutError, "axes must lie between 0 and 4, got 5"),
            ("copies.0.bytes", -1, LayoutError, "bytes must lie between 0 and"),
            ("row.data", None, LayoutError, "row must be given"),
            ("row.bytes", 1, ConfigError, "row must hold integers of 4 or 8 bytes, got 1"),
            ("rows", -1, LayoutError, "rows must lie between 0 and"),
            ("rows", 2**40, LayoutError, "the product of rows and axes must lie between"),
            ("count", -1, LayoutError, "count must lie between 0 and"),
        ],
    ),
}


def launched(library: Emulated, name: str, arguments: Any) -> bool:
    """Whether anything ran: what ran would have stopped at memory that nobody announced."""
    library.announced[:] = [(AT, 1)]
    library.call(name, arguments, 0)
    return library._loaded.emulator_report() != b""


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, (_, cases) in CASES.items() for case in cases],
    ids=lambda x: x if isinstance(x, str) else x[3],
)
def test_is_refused_with_words(name: str, case: tuple[Any, ...]) -> None:
    path, value, error, message, *also = case
    arguments = CASES[name][0]()
    put(path, value)(arguments)
    if also:
        put(*also)(arguments)
    with pytest.raises(error, match=message):
        launched(shipped(), name, arguments)


@pytest.mark.parametrize("name", [*CASES, "sra_unpack_rows"])
def test_no_arguments_at_all(name: str) -> None:
    loaded = shipped()._loaded
    assert getattr(loaded, name)(None, None) == abi.Code.NULL_POINTER
    assert loaded.sra_last_error() == b"args must be given, got NULL"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("sra_gather_attention", "queries"), ("sra_attention_lse", "queries"), ("sra_attention_lse", "items"),
        ("sra_attention_mass", "refs"), ("sra_attention_mass", "items"), ("sra_pack_rows", "rows"),
        ("sra_pack_rows", "count"), ("sra_pack_rows", "copies.0.bytes"),
    ],
)  # fmt: skip
def test_nothing_to_do_launches_nothing(name: str, path: str) -> None:
    arguments = CASES[name][0]()
    put(path, 0)(arguments)
    assert not launched(shipped(), name, arguments)


def test_every_code_has_words() -> None:
    library = shipped()
    codes = [code for name, code in vars(abi.Code).items() if name.isupper()]
    assert len({library.error_string(code) for code in codes}) == len(codes) == 6
    assert library.error_string(-99) == "unknown error code"
    assert library._loaded.sra_version() == abi.VERSION

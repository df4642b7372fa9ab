"""The structs, codes and functions of csrc/include/sra.h, for ctypes. A test holds every offset to the header."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

__all__ = [
    "FUNCTIONS",
    "MAX_AXES",
    "VERSION",
    "AttentionLseArgs",
    "AttentionMassArgs",
    "Code",
    "GatherAttentionArgs",
    "Index",
    "RowCopy",
    "RowsArgs",
    "Tensor",
]

VERSION = 1
MAX_AXES = 4


class Code:
    """What a function returns where it refused its arguments; positive codes are CUDA's own."""

    OK = 0
    NULL_POINTER = -1
    BAD_SIZE = -2
    BAD_STRIDE = -3
    MISALIGNED = -4
    UNSUPPORTED = -5


class Tensor(Structure):
    """sra_tensor: strides in elements."""

    _fields_ = (("data", c_void_p), ("item", c_int64), ("row", c_int64), ("head", c_int64))


class Index(Structure):
    """sra_index: integers of 4 or 8 bytes."""

    _fields_ = (("data", c_void_p), ("bytes", c_int64))


class GatherAttentionArgs(Structure):
    """sra_gather_attention_args."""

    _fields_ = (
        ("dtype", c_int32),
        ("channels", c_int32),
        ("heads", c_int32),
        ("key_heads", c_int32),
        ("items", c_int32),
        ("query_parts", c_int32),
        ("dense_parts", c_int32),
        ("selections", c_int32),
        ("queries", c_int64),
        ("scale", c_float),
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("k2", Tensor),
        ("v2", Tensor),
        ("k_ref", Tensor),
        ("v_ref", Tensor),
        ("out", Tensor),
        ("lse", c_void_p),
        ("cu_seqlens_q", Index),
        ("cu_seqlens_k", Index),
        ("ref_indices", Index),
        ("ref_offsets", Index),
    )


class AttentionLseArgs(Structure):
    """sra_attention_lse_args."""

    _fields_ = (
        ("dtype", c_int32),
        ("channels", c_int32),
        ("heads", c_int32),
        ("items", c_int32),
        ("queries", c_int64),
        ("keys", c_int64),
        ("query_stride", c_int64),
        ("scale", c_float),
        ("q", Tensor),
        ("k", Tensor),
        ("key_mask", Tensor),
        ("lse", Tensor),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
    )


class AttentionMassArgs(Structure):
    """sra_attention_mass_args."""

    _fields_ = (
        ("dtype", c_int32),
        ("channels", c_int32),
        ("heads", c_int32),
        ("items", c_int32),
        ("queries", c_int64),
        ("refs", c_int64),
        ("query_stride", c_int64),
        ("scale", c_float),
        ("q", Tensor),
        ("k", Tensor),
        ("value", Tensor),
        ("key_mask", Tensor),
        ("lse", Tensor),
        ("mass", Tensor),
        ("mean", Tensor),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_ref", c_void_p),
        ("ref_starts", c_void_p),
    )


class RowCopy(Structure):
    """sra_row_copy: strides in bytes."""

    _fields_ = (
        ("full", c_void_p),
        ("packed", c_void_p),
        ("bytes", c_int64),
        ("full_row", c_int64),
        ("packed_row", c_int64),
        ("axes", c_int64),
        ("sizes", c_int64 * MAX_AXES),
        ("full_strides", c_int64 * MAX_AXES),
        ("packed_strides", c_int64 * MAX_AXES),
    )


class RowsArgs(Structure):
    """sra_rows_args."""

    _fields_ = (
        ("copies", POINTER(RowCopy)),
        ("count", c_int64),
        ("row", Index),
        ("rows", c_int64),
        ("size", c_int64),
    )


#: Name -> (argument types, result type).
FUNCTIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "sra_gather_attention": ((POINTER(GatherAttentionArgs), c_void_p), c_int),
    "sra_attention_lse": ((POINTER(AttentionLseArgs), c_void_p), c_int),
    "sra_attention_mass": ((POINTER(AttentionMassArgs), c_void_p), c_int),
    "sra_pack_rows": ((POINTER(RowsArgs), c_void_p), c_int),
    "sra_unpack_rows": ((POINTER(RowsArgs), c_void_p), c_int),
    "sra_version": ((), c_int),
    "sra_error_string": ((c_int,), c_char_p),
    "sra_last_error": ((), c_char_p),
}

"""The struct and functions of csrc/cpu/sra_cpu.h, for ctypes. A test holds every offset to the header."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

from .abi import Index, Tensor

__all__ = ["FUNCTIONS", "TARGETS", "VERSION", "AttendTilesArgs"]

VERSION = 1
TARGETS = ("baseline", "avx2", "avx512")
"""What the kernels are compiled for, by its number in the header."""


class AttendTilesArgs(Structure):
    """sra_cpu_attend_tiles_args."""

    _fields_ = (
        ("dtype", c_int32),
        ("channels", c_int32),
        ("heads", c_int32),
        ("key_heads", c_int32),
        ("items", c_int32),
        ("query_parts", c_int32),
        ("selections", c_int32),
        ("carry", c_int32),
        ("threads", c_int32),
        ("target", c_int32),
        ("tiles", c_int64),
        ("queries", c_int64),
        ("bank", c_int64),
        ("means", c_int64),
        ("scale", c_float),
        ("q", Tensor),
        ("k2", Tensor),
        ("v2", Tensor),
        ("k_ref", Tensor),
        ("v_ref", Tensor),
        ("out", Tensor),
        ("lse", c_void_p),
        ("bias", c_void_p),
        ("bias_row", c_int64),
        ("cu_tiles", Index),
        ("cu_seqlens_q", Index),
        ("cu_means", Index),
        ("ref_indices", Index),
        ("ref_offsets", Index),
    )


#: Name -> (argument types, result type).
FUNCTIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "sra_cpu_attend_tiles": ((POINTER(AttendTilesArgs), c_void_p, c_int64), c_int),
    "sra_cpu_attend_tiles_room": ((POINTER(AttendTilesArgs),), c_int64),
    "sra_cpu_exp2": ((c_int, c_void_p, c_void_p, c_int64), c_int),
    "sra_cpu_target": ((), c_int),
    "sra_cpu_version": ((), c_int),
    "sra_cpu_last_error": ((), c_char_p),
}

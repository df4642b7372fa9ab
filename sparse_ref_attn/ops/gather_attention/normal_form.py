"""From what the caller gave to `Arguments`: shapes, dtypes and devices are checked here, values later.

Nothing here reads a tensor's values, so the whole file traces under torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError, LayoutError
from .arguments import Arguments
from .host_offsets import HostOffsets, flatten_offsets
from .query_tiles import check_tiles

__all__ = ["normalise"]


def normalise(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k2: Tensor | None,
    v2: Tensor | None,
    k_ref: Tensor | None,
    v_ref: Tensor | None,
    ref_indices: Tensor | None,
    ref_offsets: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float | None,
    distinct: bool,
    host: HostOffsets | None = None,
    cu_tiles: Tensor | None = None,
    bias: Tensor | None = None,
) -> Arguments:
    """Check structure, pack (B, N, H, C) operands, fill in the offsets that shapes imply."""
    if q.ndim not in (3, 4) or q.shape[-1] == 0 or q.shape[-2] == 0:
        raise LayoutError(f"q must be (T, H, C) packed or (B, N, H, C), got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise LayoutError(f"q must have a floating dtype, got {q.dtype}")
    for name, x in (("q", q), ("k", k), ("v", v), ("k2", k2), ("v2", v2), ("k_ref", k_ref), ("v_ref", v_ref)):
        if x is not None and x.ndim and x.stride(-1) != 1 and x.shape[-1] > 1:
            raise LayoutError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
    pairs = (("k", k, "v", v), ("k2", k2, "v2", v2), ("k_ref", k_ref, "v_ref", v_ref))
    for name, key, value_name, value in pairs:
        _check_pair(q, name, key, value_name, value)
    if k is None and k_ref is None:
        raise LayoutError("there must be keys to attend to: k and v, or k_ref and v_ref, got neither")
    if k2 is not None and k is None:
        raise LayoutError("k2 is the second dense segment and needs the first, got k2 without k")
    heads = {x.shape[-2] for x in (k, k2, k_ref) if x is not None}
    if len(heads) > 1 or q.shape[-2] % next(iter(heads)):
        raise LayoutError(
            "all keys must share a number of heads that divides that of q, "
            f"got {sorted(heads)} key heads for {q.shape[-2]} query heads"
        )
    if (k_ref is None) != (ref_indices is None):
        raise LayoutError("k_ref and ref_indices go together, got one without the other")
    check_tiles(cu_tiles, bias, q, k2, ref_indices)

    implied = (cu_seqlens_q is None, cu_seqlens_k is None, ref_offsets is None)
    batched = q.ndim == 4
    if batched:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise LayoutError("cu_seqlens belong to packed (T, H, C) operands, got them with a (B, N, H, C) q")
        items = q.shape[0]
        cu_seqlens_q = _even(items, q.shape[1], q.device)[None]
        parts = [_even(items, x.shape[1], q.device) for x in (k, k2) if x is not None]
        cu_seqlens_k = torch.stack(parts) if parts else None
        q, k, v, k2, v2 = (None if x is None else x.flatten(0, 1) for x in (q, k, v, k2, v2))  # type: ignore[assignment]
    else:
        cu_seqlens_q = _offsets("cu_seqlens_q", cu_seqlens_q, q, q.device)
        items = cu_seqlens_q.shape[1] - 1
        if k is not None:
            cu_seqlens_k = _dense_offsets(cu_seqlens_k, k, k2, q.device)
            if cu_seqlens_k.shape[1] != items + 1:
                raise LayoutError(
                    f"cu_seqlens_q and cu_seqlens_k must describe the same {items} items, "
                    f"got {cu_seqlens_k.shape[1] - 1} in cu_seqlens_k"
                )
        elif cu_seqlens_k is not None:
            raise LayoutError("cu_seqlens_k describes k, got it without k")
    if k_ref is not None and v_ref is not None and k_ref.ndim == 4:
        k_ref, v_ref = k_ref.flatten(0, 1), v_ref.flatten(0, 1)
    selections = items if cu_tiles is None else cu_tiles.shape[0] - 1
    if ref_indices is not None:
        assert k_ref is not None
        of = "item" if cu_tiles is None else "tile"
        ref_indices, ref_offsets = _selection(ref_indices, ref_offsets, selections, of, k_ref.shape[1], q.device)
    elif ref_offsets is not None:
        raise LayoutError("ref_offsets split ref_indices, got them without ref_indices")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ConfigError(f"scale must be positive and finite, got {scale}")
    flat = None
    if not torch.compiler.is_compiling():
        known = _known(host or HostOffsets(), implied, items, selections, q, (k, k2), ref_indices)
        flat = flatten_offsets(known, cu_seqlens_q, cu_seqlens_k, ref_offsets, cu_tiles)
    return Arguments(
        q, k, v, k2, v2, k_ref, v_ref, cu_seqlens_q, cu_seqlens_k, ref_indices, ref_offsets, scale, bool(distinct),
        flat, None if cu_tiles is None else cu_tiles.contiguous(), bias,
    )  # fmt: skip


def _known(
    host: HostOffsets,
    implied: tuple[bool, bool, bool],
    items: int,
    selections: int,
    q: Tensor,
    keys: tuple[Tensor | None, Tensor | None],
    ref_indices: Tensor | None,
) -> HostOffsets:
    """`host`, and the offsets that the shapes of packed operands imply."""

    def even(rows: int, count: int = items) -> list[int]:
        return [rows // max(count, 1) * each for each in range(count + 1)]

    of_q, of_k, of_ref, tiles = host
    if implied[0]:
        of_q = [even(q.shape[0])]
    if implied[1] and keys[0] is not None:
        of_k = [even(x.shape[0]) for x in keys if x is not None]
    if implied[2] and ref_indices is not None:
        of_ref = [even(ref_indices.shape[0], selections)]
    return HostOffsets(of_q, of_k, of_ref, tiles)


def _check_pair(q: Tensor, name: str, key: Tensor | None, value_name: str, value: Tensor | None) -> None:
    if (key is None) != (value is None):
        raise LayoutError(f"{name} and {value_name} go together, got one without the other")
    if key is None or value is None:
        return
    ndims = (3, 4) if name == "k_ref" else (q.ndim,)
    if key.shape != value.shape or key.ndim not in ndims or key.shape[-1] != q.shape[-1] or key.shape[-2] == 0:
        raise LayoutError(
            f"{name} and {value_name} must share one shape with the {q.shape[-1]} channels of q and "
            f"{' or '.join(map(str, ndims))} dimensions, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if q.ndim == 4 and key.ndim == 4 and name != "k_ref" and key.shape[0] != q.shape[0]:
        raise LayoutError(f"{name} must have the batch size of q, {q.shape[0]}, got {key.shape[0]}")
    for label, x in ((name, key), (value_name, value)):
        if x.dtype != q.dtype or x.device != q.device:
            raise LayoutError(
                f"{label} must have the dtype and device of q, {q.dtype} on {q.device}, got {x.dtype} on {x.device}"
            )


def _even(items: int, length: int, device: torch.device) -> Tensor:
    """Offsets of `items` stretches of one length, int32."""
    return torch.arange(items + 1, dtype=torch.int32, device=device) * length


def _offsets(name: str, cu: Tensor | None, rows_of: Tensor, device: torch.device) -> Tensor:
    """(P, B+1) from None (one item), (B+1,) or (P, B+1)."""
    if cu is None:
        return _even(1, rows_of.shape[0], device)[None]
    _check_integer(name, cu, device)
    if cu.ndim not in (1, 2) or cu.shape[-1] < 2 or (cu.ndim == 2 and cu.shape[0] not in (1, 2)):
        raise LayoutError(f"{name} must be (B + 1,) or (parts, B + 1) with one part or two, got {tuple(cu.shape)}")
    return (cu if cu.ndim == 2 else cu[None]).contiguous()


def _dense_offsets(cu: Tensor | None, k: Tensor, k2: Tensor | None, device: torch.device) -> Tensor:
    if cu is None and k2 is not None:
        return torch.stack([_even(1, k.shape[0], device), _even(1, k2.shape[0], device)])
    cu = _offsets("cu_seqlens_k", cu, k, device)
    if k2 is not None and cu.shape[0] != 2:
        raise LayoutError(f"cu_seqlens_k must be (2, B + 1), one row for k and one for k2, got {tuple(cu.shape)}")
    return cu


def _selection(
    indices: Tensor, offsets: Tensor | None, count: int, of: str, key_heads: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Flat indices and offsets (1, B+1) or (G, B+1) of `count` items or tiles."""
    letter = "B" if of == "item" else "T"
    _check_integer("ref_indices", indices, device)
    if offsets is None:
        if indices.ndim == 2 and indices.shape[0] == count:
            return indices.flatten(), _even(count, indices.shape[1], device)[None]
        if indices.ndim == 1 and count == 1:
            return indices.contiguous(), _even(1, indices.shape[0], device)[None]
        raise LayoutError(
            f"ref_indices of {count} {of}s must come with ref_offsets, or as ({letter}, K), "
            f"got {tuple(indices.shape)} alone"
        )
    _check_integer("ref_offsets", offsets, device)
    if indices.ndim != 1:
        raise LayoutError(f"ref_indices must be a vector where ref_offsets are given, got {tuple(indices.shape)}")
    if offsets.ndim not in (1, 2) or offsets.shape[-1] != count + 1:
        raise LayoutError(
            f"ref_offsets must be ({letter} + 1,) or (G, {letter} + 1) for {count} {of}s, got {tuple(offsets.shape)}"
        )
    if offsets.ndim == 2 and offsets.shape[0] not in (1, key_heads):
        raise LayoutError(f"ref_offsets must have one row, or one per key head ({key_heads}), got {offsets.shape[0]}")
    return indices.contiguous(), (offsets if offsets.ndim == 2 else offsets[None]).contiguous()


def _check_integer(name: str, x: Tensor, device: torch.device) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise LayoutError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.device != device:
        raise LayoutError(f"{name} must lie on the device of q, {device}, got {x.device}")

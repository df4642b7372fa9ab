"""The public door of the op: validation, then the best implementation at hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import LayoutError
from .registered import mass_op, mass_tiles_op

__all__ = ["attention_mass"]


def attention_mass(
    q: Tensor,
    k: Tensor,
    span: tuple[int, int],
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_stride: int = 1,
    lse: Tensor | None = None,
    value: Tensor | None = None,
    reduce_heads: bool = False,
    tiles: Tensor | None = None,
    host: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Mean attention that queries pay to each key of a span, per head.

    Column means of a block of the softmax matrix (ReCAST eq. 2 when the queries are the
    generation tokens and the span is the reference's keys):

    .. math:: s_{hk} = \frac{1}{N} \sum_{j=1}^{N} \operatorname{softmax}_k(a \langle q_{hj}, k_{h\cdot} \rangle)

    where the softmax runs over *all* keys. The N x S block is never stored whole. With `value` the
    score is ToPi's [2]_, ``s[h, k] * ||v[h, k]||``. With `tiles` the mean is over each tile's queries,
    one result a tile.

    Parameters
    ----------
    q : Tensor, shape (B, N, H, C), float16 | bfloat16 | float32
        Queries after QK-norm and RoPE.
    k : Tensor, shape (B, S, H, C), dtype of `q`
        All keys that the queries attend to, after QK-norm and RoPE.
    span : (int, int)
        First and past-the-last key whose mass is wanted (R = stop - start).
    scale : float, optional
        The score scale ``a``. Default ``C ** -0.5``.
    key_mask : Tensor, shape (B, S), bool, optional
        True where a key may be attended (padding of prompts is False).
    query_stride : int
        Use every n-th query only. Default 1, all; with `tiles` it must be 1.
    lse : Tensor, shape (B, H, N), float32, optional
        Natural-log LSE of every query's scaled scores over all keys that it may attend, as
        `gather_attention` returns it. Then only the span's keys are read: at R of S keys, R / S of the work in plain
        PyTorch and R / (S + R) of it in the kernels. Default: computed here.
    value : Tensor, shape (B, S, H, C), floating, optional
        Values; each mass is multiplied by the Euclidean norm of its value.
    reduce_heads : bool
        Return the mean over the heads. Default False.
    tiles : Tensor, shape (T + 1,), int32 | int64, contiguous, optional
        Where each tile's queries begin, and the end: tile t is the rows ``tiles[t]`` to ``tiles[t + 1] - 1`` of `q`, in
        every item. They cover all rows in order and may be of any sizes; one without queries gets zeros. Default: no
        tiles, the mean over all queries.
    host : sequence of int, optional
        What `tiles` holds, where the host knows it: then no backend reads it from the device. It is believed.
    backend : {"auto", "reference", "chunked", "triton", "cuda"}
        "reference" is the formula as it stands and stores the N x S block; "chunked" is plain PyTorch;
        "triton" takes float16 and bfloat16, C in {32, 64, 128}, a scale above 0, and tensors with a
        contiguous last dim whose pointers and strides are multiples of 16 bytes and elements; "cuda" (the
        kernels of csrc) the same with C in {64, 128} and 16 bytes for both and no `tiles`. A named backend never
        falls back.
        "auto" is "chunked" on a CPU, and on a card the fastest that agreed with float64 there.

    Returns
    -------
    Tensor, shape (B, H, R), or (B, R) with `reduce_heads`, float32
        With `tiles` (B, H, T, R) or (B, T, R); their mean, weighted by the tiles' numbers of queries, is the result
        without. In [0, 1] without `value`; each row sums to at most 1, the shortfall went to the other keys. A query
        that may attend to no key gives nothing; without queries there are zeros.

    Raises
    ------
    LayoutError
        If shapes, dtypes or devices disagree, the span is empty or outside the keys, tiles do not run from 0 to N
        without decreasing, or only every n-th query is wanted of them.
    ConfigError
        If the backend cannot do the call; the message says why.

    See Also
    --------
    attention_mass_varlen : The same for packed rows of items of unequal length, without tiles.

    Notes
    -----
    Not differentiable: a ranking needs no gradient. Float32 accumulation. Deterministic: one program owns one block of
    reference tokens, no atomics. No host sync, but for one that reads `tiles` on a card in plain PyTorch, unless `host`
    tells them. With `tiles` and `value` the masses of all heads are held at once, B H T R numbers, also where they are
    reduced.

    References
    ----------
    .. [1] Han et al., "ReCAST: Probing Sparse Reference Use in In-Context Image Generation",
       FoGen at ICML 2026, eq. (2).
    .. [2] ToPi, arXiv 2602.01609.

    Examples
    --------
    With all keys alike, each of 5 keys gets one fifth:

    >>> import torch
    >>> attention_mass(torch.zeros(1, 4, 1, 16), torch.zeros(1, 5, 1, 16), (2, 5))
    tensor([[[0.2000, 0.2000, 0.2000]]])

    The first query looks at the second key, the other two at the first; tiles of one and of two queries:

    >>> q = torch.tensor([[0.0, 20.0], [20.0, 0.0], [20.0, 0.0]]).view(1, 3, 1, 2)
    >>> k = torch.tensor([[20.0, 0.0], [0.0, 20.0]]).view(1, 2, 1, 2)
    >>> attention_mass(q, k, (0, 2), tiles=torch.tensor([0, 1, 3]), reduce_heads=True)
    tensor([[[0., 1.],
             [1., 0.]]])
    """
    _check(q, k, span, key_mask, query_stride, lse, value)
    if tiles is not None:
        _check_tiles(q, tiles, host, query_stride)
    elif host is not None:
        raise LayoutError("host must be what tiles holds, got no tiles")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = None if key_mask is None else key_mask.bool()
    weights = None if value is None else _norms(value[:, span[0] : span[1]])
    if tiles is None:
        mass = mass_op(q.detach(), k.detach(), *span, scale, mask, lse, query_stride, backend)
    else:
        known = None if host is None else [int(offset) for offset in host]
        reduced = reduce_heads and weights is None
        mass = mass_tiles_op(q.detach(), k.detach(), *span, scale, mask, lse, tiles, known, reduced, backend)
        if reduced:
            return mass
        weights = None if weights is None else weights[:, :, None]
    if weights is not None:
        mass = mass * weights
    return mass.mean(dim=1) if reduce_heads else mass


def _norms(value: Tensor) -> Tensor:
    """(B, R, H, C) -> (B, H, R)."""
    return value.detach().float().norm(dim=-1).transpose(1, 2)


def _check(
    q: Tensor,
    k: Tensor,
    span: tuple[int, int],
    key_mask: Tensor | None,
    query_stride: int,
    lse: Tensor | None,
    value: Tensor | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise LayoutError(
            f"q (B, N, H, C) and k (B, S, H, C) must agree in B, H and C, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.dtype != k.dtype or q.device != k.device or not q.is_floating_point():
        raise LayoutError(
            f"q and k must share a floating dtype and a device, got {q.dtype} on {q.device} and {k.dtype} on {k.device}"
        )
    if not 0 <= span[0] < span[1] <= k.shape[1]:
        raise LayoutError(f"span must lie within the {k.shape[1]} keys and not be empty, got {span}")
    if query_stride < 1:
        raise LayoutError(f"query_stride must be at least 1, got {query_stride}")
    if key_mask is not None and (key_mask.shape != (k.shape[0], k.shape[1]) or key_mask.dtype.is_floating_point):
        raise LayoutError(f"key_mask must be bool of shape {(k.shape[0], k.shape[1])}, got {tuple(key_mask.shape)}")
    rows = (q.shape[0], q.shape[2], q.shape[1])
    if lse is not None and (lse.shape != rows or lse.dtype != torch.float32 or lse.device != q.device):
        raise LayoutError(
            f"lse must be (B, H, N) = {rows}, float32 on {q.device}, "
            f"got {tuple(lse.shape)}, {lse.dtype} on {lse.device}"
        )
    if value is not None and (value.shape[:3] != k.shape[:3] or value.device != q.device):
        raise LayoutError(f"value must have the rows of k {tuple(k.shape)}, got {tuple(value.shape)}")


def _check_tiles(q: Tensor, tiles: Tensor, host: Sequence[int] | None, query_stride: int) -> None:
    integer = tiles.dtype in (torch.int32, torch.int64)
    if tiles.ndim != 1 or not tiles.shape[0] or not integer or tiles.device != q.device or not tiles.is_contiguous():
        raise LayoutError(
            f"tiles must be (T + 1,) int32 or int64, contiguous, on {q.device}, "
            f"got {tuple(tiles.shape)}, {tiles.dtype} on {tiles.device}"
        )
    if host is not None and len(host) != tiles.shape[0]:
        raise LayoutError(f"host must hold the {tiles.shape[0]} numbers of tiles, got {len(host)}")
    if query_stride != 1:
        raise LayoutError(f"query_stride must be 1 with tiles, of which every query counts, got {query_stride}")

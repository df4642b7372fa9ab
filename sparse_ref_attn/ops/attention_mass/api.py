"""The public door of the op: validation, then the best implementation at hand."""

from __future__ import annotations

from torch import Tensor

from ...errors import LayoutError
from .chunked import attention_mass_chunked

__all__ = ["attention_mass"]


def attention_mass(
    q: Tensor,
    k: Tensor,
    span: tuple[int, int],
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_stride: int = 1,
) -> Tensor:
    r"""Mean attention that queries pay to each key of a span, per head.

    Column means of a block of the softmax matrix (ReCAST eq. 2 when the queries are the
    generation tokens and the span is the reference's keys):

    .. math:: s_{hk} = \frac{1}{N} \sum_{j=1}^{N} \operatorname{softmax}_k(a \langle q_{hj}, k_{h\cdot} \rangle)

    where the softmax runs over *all* keys. The N x S block is never stored whole.

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
        Use every n-th query only. Default 1, all.

    Returns
    -------
    Tensor, shape (B, H, R), float32
        In [0, 1]; each row sums to at most 1, the shortfall went to the other keys.

    Raises
    ------
    LayoutError
        If shapes, dtypes or devices disagree, or the span is empty or outside the keys.

    Notes
    -----
    Not differentiable: a ranking needs no gradient. Float32 accumulation. No host sync.

    References
    ----------
    .. [1] Han et al., "ReCAST: Probing Sparse Reference Use in In-Context Image Generation",
       FoGen at ICML 2026, eq. (2).

    Examples
    --------
    With all keys alike, each of 5 keys gets one fifth:

    >>> import torch
    >>> attention_mass(torch.zeros(1, 4, 1, 16), torch.zeros(1, 5, 1, 16), (2, 5))
    tensor([[[0.2000, 0.2000, 0.2000]]])
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise LayoutError(
            f"q (B, N, H, C) and k (B, S, H, C) must agree in B, H and C, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.dtype != k.dtype or q.device != k.device or not q.is_floating_point():
        raise LayoutError(
            "q and k must share a floating dtype and a device, "
            f"got {q.dtype} on {q.device} and {k.dtype} on {k.device}"
        )
    if not 0 <= span[0] < span[1] <= k.shape[1]:
        raise LayoutError(f"span must lie within the {k.shape[1]} keys and not be empty, got {span}")
    if query_stride < 1:
        raise LayoutError(f"query_stride must be at least 1, got {query_stride}")
    if key_mask is not None and (key_mask.shape != (k.shape[0], k.shape[1]) or key_mask.dtype.is_floating_point):
        raise LayoutError(f"key_mask must be bool of shape {(k.shape[0], k.shape[1])}, got {tuple(key_mask.shape)}")
    q = q[:, ::query_stride]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = None if key_mask is None else key_mask.bool()
    return attention_mass_chunked(q.detach(), k.detach(), span, scale, mask)

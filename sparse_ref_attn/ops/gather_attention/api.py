"""The public door of the op: validation, then the registered op or the definition."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ...errors import ConfigError
from .backends import MODULES
from .host_offsets import HostOffsets
from .normal_form import normalise

__all__ = ["BACKENDS", "gather_attention"]

BACKENDS = ("auto", "reference", *MODULES)


@overload
def gather_attention(
    q: Tensor,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    k_ref: Tensor | None = ...,
    v_ref: Tensor | None = ...,
    ref_indices: Tensor | None = ...,
    ref_offsets: Tensor | None = ...,
    *,
    k2: Tensor | None = ...,
    v2: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    cu_tiles: Tensor | None = ...,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    distinct: bool = ...,
    host: HostOffsets | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
    check: bool = ...,
) -> Tensor: ...


@overload
def gather_attention(
    q: Tensor,
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    k_ref: Tensor | None = ...,
    v_ref: Tensor | None = ...,
    ref_indices: Tensor | None = ...,
    ref_offsets: Tensor | None = ...,
    *,
    k2: Tensor | None = ...,
    v2: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    cu_tiles: Tensor | None = ...,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    distinct: bool = ...,
    host: HostOffsets | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
    check: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def gather_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    k_ref: Tensor | None = None,
    v_ref: Tensor | None = None,
    ref_indices: Tensor | None = None,
    ref_offsets: Tensor | None = None,
    *,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_tiles: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    distinct: bool = False,
    host: HostOffsets | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend to dense keys and to the kept rows of a bank of reference keys, in one softmax.

    For query j of item b and head h, over the keys k in the item's dense rows D(b) and its kept
    bank rows K(b, g), with key/value head ``g = h // (H / G)``:

    .. math::
        \ell_{jh} = \log \sum_{k \in D(b) \cup K(b, g)} \exp(a \langle q_{jh}, k_{kg} \rangle), \qquad
        o_{jh} = \sum_{k \in D(b) \cup K(b, g)} \exp(a \langle q_{jh}, k_{kg} \rangle - \ell_{jh}) \, v_{kg}

    The bank is read by index and shared by all items; nobody copies it per item. Items have their
    own numbers of queries, dense keys and kept rows.

    Parameters
    ----------
    q : Tensor, shape (T, H, C) packed or (B, N, H, C), float16 | bfloat16 | float32 | float64
        Queries after QK-norm and RoPE. Any strides with the last dimension contiguous.
    k, v : Tensor, shape (M, G, C) packed or (B, M, G, C), optional
        Dense keys (after QK-norm and RoPE) and values: text and generation. G divides H.
    k_ref, v_ref : Tensor, shape (R, G, C), optional
        The bank of reference keys and values, after QK-norm and RoPE. (B, R, G, C) is read as
        (B * R, G, C), and indices count through all of it.
    ref_indices : Tensor, shape (nnz,) or (B, K), int32 | int64, optional
        Bank rows kept, in any order: item 0's, then item 1's (CSR). (B, K) gives every item K.
        A row named twice is attended to twice.
    ref_offsets : Tensor, shape (B + 1,) or (G, B + 1), int32 | int64, optional
        Item b keeps ``ref_indices[ref_offsets[b] : ref_offsets[b + 1]]``. With one row for each
        key/value head, head g keeps ``ref_indices[ref_offsets[g, b] : ref_offsets[g, b + 1]]``;
        ``ref_offsets[g + 1, 0]`` equals ``ref_offsets[g, B]``. Not needed for a single item.
    k2, v2 : Tensor, as `k`, optional
        A second dense segment, attended to beside the first.
    cu_seqlens_q : Tensor, shape (B + 1,) or (2, B + 1), int32 | int64, optional
        Packed only: item b's queries are the rows ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]``. Two rows
        where an item's text and image queries lie apart, as in ``[all text | all image]``: the second
        row continues where the first ends. Default: one item.
    cu_seqlens_k : Tensor, shape (B + 1,) or (2, B + 1), int32 | int64, optional
        The same for `k`. With `k2`, the second row counts from 0 in `k2`.
    cu_tiles : Tensor, shape (T + 1,), int32 | int64, optional
        Selections of query tiles in place of items: tile t is the rows ``cu_tiles[t] : cu_tiles[t + 1]`` of packed q,
        or of (B, N, H, C) flattened to (B * N, H, C), and keeps ``ref_indices[ref_offsets[t] : ref_offsets[t + 1]]``.
        `ref_offsets` are then (T + 1,) or (G, T + 1), and `ref_indices` alone (T, K). Tiles cover all rows in order,
        and none crosses from one item, or part of one, to another. Dense keys stay those of the item.
    bias : Tensor, shape (T, W), float32, optional
        Added to the scaled scores of tile t's queries with the item's j-th row of `k2`: ``bias[t, j]``. W is at least
        the longest item's rows of `k2`. -inf leaves a key out. Needs `k2` and `cu_tiles`.
    scale : float, optional
        The score scale ``a``, positive. Default ``C ** -0.5``.
    distinct : bool
        Promise that no bank row is named twice (per head), not even by two items. Gradients of the
        bank are then stored directly instead of summed. Default False. A broken promise gives wrong
        gradients of the bank.
    host : HostOffsets, optional
        What the offsets hold, where the host knows it: then no backend reads them from the device, forward or
        backward. They are believed, unless `check` is set.
    return_lse : bool
        Return the log-sum-exp too. Default False.
    backend : {"auto", "reference", "sdpa", "triton", "flash", "flex", "cuda", "cpp"}
        Who computes it. A name that cannot do the call raises, with its reasons. "auto" is "cpp" on a CPU where that
        is built and can do the call, else "sdpa"; on a card it is the fastest that agreed with float64 there, for this
        kind of call: found once, in a second or two, and kept (``sra doctor --verify``). "reference" is the
        definition. "cuda" computes the forward with the kernels of csrc, float16 or bfloat16 with C in {64, 128}, and
        leaves the backward to "triton", whose reasons then count too. "cpp" computes selections of query tiles on a
        CPU with the kernel of csrc/cpu, float32 or bfloat16 with C a multiple of 8, where it is built
        (``sra build-kernels``).
    check : bool
        Check the values of indices and offsets on CUDA too, which waits for the device. On the CPU they
        are always checked. Unchecked, a bad index reads foreign memory. Default False.

    Returns
    -------
    out : Tensor, shape and dtype of `q`
        Zero for queries without any key.
    lse : Tensor, shape (H, T) packed or (B, H, N), float32 (float64 for float64 inputs)
        Natural logarithm; -inf for queries without any key. Only with `return_lse`.

    Raises
    ------
    LayoutError
        If shapes, dtypes, devices or strides disagree with the above, an offset does not tile its
        tensor, a query tile crosses items, or an index lies outside the bank.
    ConfigError
        If the scale is not positive, the backend is unknown or cannot do this call, or it is to be differentiated
        through query tiles and is not "reference".

    See Also
    --------
    attention_mass : How much the queries look at each reference row, from the LSE.

    Notes
    -----
    Differentiable in q, k, v, k2, v2, k_ref and v_ref, through `out` and through the LSE, once ("reference": to any
    order). Dropped rows get a gradient of exactly zero. The order of kept rows changes the result to rounding only.
    With `cu_tiles` only "reference" is differentiable.

    Deterministic: gradients of gathered rows are stored packed and summed in a fixed order. On CUDA this holds for
    "triton" and "cuda"; PyTorch's own attention kernels ("sdpa", "flash", "flex") may add up dq in any order unless
    ``torch.use_deterministic_algorithms(True)`` is set.

    "flash" calls the first that can of flash-attn 3, fa3-fwd (bfloat16, forward only: the next one computes the
    gradients), flash-attn 2.7 or later, and the FlashAttention inside PyTorch. A user's
    ``torch.nn.attention.activate_flash_attention_impl`` decides what the last one is.

    The score matrix is never stored (but by "reference", and by "flex" on a CPU). "sdpa", "flash" and "flex" hold one
    copy of the kept keys and values. "triton", "cuda" and "flash" never wait for the device, so a CUDA graph can hold
    them; "sdpa" does, to read offsets that neither `host` nor the shapes tell. Selections per key/value head need
    "triton", "cuda", "sdpa" or "reference"; selections of query tiles "triton", "cpp", "sdpa" or
    "reference".

    With query tiles, "triton", "cpp" and "sdpa" attend once to the keys that an item's tiles share, and then to those
    that are each tile's own: a kernel goes on with the first one's softmax, and "sdpa" joins the two by their LSE.
    "sdpa" is made for many tiles of equal numbers of queries and kept rows, and copies these rows for each tile; "cpp"
    reads them where they lie, or lays each once side by side. Its results are the same bits with any number of threads.

    The Triton kernels are proved under the interpreter, those of csrc under their emulator, and both are compiled ahead
    of time for compute capabilities 8.0, 9.0 and 10.0; docs/configurations.md says what a card has run. "cpp" is
    compared with float64 once a process, before it is first used.

    References
    ----------
    .. [1] Dao, "FlashAttention-2", ICLR 2024: the online softmax and its backward.
    .. [2] Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.

    Examples
    --------
    Two packed items share a bank of four reference rows; the first keeps rows 3 and 0, the second none:

    >>> import torch
    >>> q, k = torch.zeros(3, 1, 16), torch.zeros(3, 1, 16)
    >>> v, bank = torch.zeros(3, 1, 16), torch.zeros(4, 1, 16)
    >>> values = torch.arange(4.0)[:, None, None].expand(4, 1, 16).contiguous()
    >>> cu = torch.tensor([0, 1, 3], dtype=torch.int32)
    >>> out, lse = gather_attention(
    ...     q, k, v, bank, values, torch.tensor([3, 0]), torch.tensor([0, 2, 2]),
    ...     cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True,
    ... )
    >>> out[:, 0, 0]  # (0 + 3 + 0) / 3 keys for the first item
    tensor([1., 0., 0.])
    >>> lse.exp().round()
    tensor([[3., 2., 2.]])

    One item in two query tiles, which read a row each, and the mean of the others with the weight of three:

    >>> gather_attention(
    ...     q, k, v, bank, values, torch.tensor([[3], [0]]), k2=bank[:1], v2=values[1:2], cu_seqlens_k=None,
    ...     cu_tiles=cu, bias=torch.tensor([[3.0], [3.0]]).log(), return_lse=True,
    ... )[1].exp().round()
    tensor([[7., 7., 7.]])
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    a = normalise(
        q, k, v, k2, v2, k_ref, v_ref, ref_indices, ref_offsets, cu_seqlens_q, cu_seqlens_k, scale, distinct, host,
        cu_tiles, bias,
    )  # fmt: skip
    if backend == "reference":
        from .reference import gather_attention_reference

        out, lse = gather_attention_reference(a)
    else:
        from .registered import gather_attention_op

        out, lse = gather_attention_op(a, backend, check)
    if q.ndim == 4:
        out = out.view(q.shape)
        lse = lse.view(q.shape[2], q.shape[0], q.shape[1]).transpose(0, 1)
    return (out, lse) if return_lse else out

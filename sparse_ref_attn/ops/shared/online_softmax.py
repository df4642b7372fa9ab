"""Steps that the Triton kernels share. Letters as in `functional`; upper case is known when compiling.

Scores travel *raw* (before the scale) and exponents are of base 2: with ``scale2 = scale * log2(e)`` one fused
multiply-add makes ``s * scale2 - pivot``. That needs ``scale > 0``, so that the largest raw score is the largest score.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(s, m, total, scale2):
    """One tile of raw scores s [M, N] joins a running softmax with maximum m [M] and sum `total` [M].

    Returns the tile's weights [M, N] against the new maximum, the factor [M] for what was summed before, and the new
    maximum and sum.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    # a row with no live key keeps a finite pivot: -inf - -inf would be NaN
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new) * scale2
    p = tl.math.exp2(s * scale2 - pivot[:, None])
    alpha = tl.math.exp2(m * scale2 - pivot)
    return p, alpha, m_new, total * alpha + tl.sum(p, 1)


@triton.jit
def natural_lse(m, total, scale2):
    """The natural-log LSE [M] of a running softmax; -inf for a row without keys."""
    empty = total == 0.0
    return tl.where(empty, float("-inf"), (m * scale2 + tl.math.log2(tl.where(empty, 1.0, total))) * LN2)


@triton.jit
def base2_lse(lse):
    """Natural-log LSE -> what to subtract from ``s * scale2``; rows without keys give exp2(-inf) = 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E

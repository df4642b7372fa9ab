r"""How far float32 may be off: what random rounding does to the formula, drawn in float64.

A float32 kernel has no wider accumulator than plain PyTorch in float32: both are off by a few roundings, and which of
the two had more luck depends on the processor and its BLAS. So PyTorch's error is no yardstick there. (In half
precision it is one, see `tolerance`: the kernels accumulate in float32, and PyTorch's own roundings are far larger.)

Here every rounding is an independent random number, as in Monte Carlo arithmetic (Parker 1997). One to nearest is off
by at most 2^-24 of the result, evenly spread: a standard deviation of u = 2^-24 / sqrt(3). So a result x becomes
x (1 + u e), and a sum of n terms

    sum_i x_i + u sqrt(1 + n / 3) (sum_i |x_i|) e        e ~ N(0, 1)

because the i-th partial sum, about i / n of sum_i |x_i| at most, rounds too: u^2 sum_i (i / n)^2 = u^2 n / 3, and
whoever sums in blocks or lanes rounds less. The formula is evaluated in float64 with such numbers in place of
float32's roundings. `DEVIATIONS` times the standard deviation of an element over `DRAWS` evaluations is what is allowed
to it. That depends on the operands alone: on no processor's arithmetic, no order of summation, no luck.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .problems import Problem, counts

__all__ = ["assert_rounded", "of_attention", "of_mass", "of_product"]

U = 2.0**-24 / 3**0.5
DRAWS = 64
DEVIATIONS = 6.0  # of a normal distribution, two elements in 10^9 lie farther out


def assert_rounded(actual: Tensor, truth: Tensor, deviation: Tensor, name: str = "result") -> None:
    """|actual - truth| <= DEVIATIONS x deviation in each element; infinities agree exactly, NaN is never accepted."""
    assert actual.dtype == torch.float32, f"{name}: these are the roundings of float32, got {actual.dtype}"
    assert truth.dtype == deviation.dtype == torch.float64, f"{name}: truth and deviation must be float64"
    assert actual.shape == truth.shape == deviation.shape, f"{name}: {actual.shape}, {truth.shape}, {deviation.shape}"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} of {actual.numel()} are NaN"
    infinite = truth.isinf()
    assert torch.equal(actual.double()[infinite], truth[infinite]), f"{name}: infinities differ"
    error, allowed = (actual.double() - truth).abs()[~infinite], DEVIATIONS * deviation[~infinite]
    if (error > allowed).any():
        worst = (error - allowed).argmax()
        raise AssertionError(
            f"{name}: error {float(error[worst]):.3e}, rounding in float32 allows {float(allowed[worst]):.3e} "
            f"({int((error > allowed).sum())} of {error.numel()} elements are farther off)"
        )


class Rounding:
    """Random roundings; with unit 0, none."""

    def __init__(self, unit: float, seed: int) -> None:
        self.unit = unit
        self.generator = torch.Generator().manual_seed(seed)

    def off(self, size: Tensor) -> Tensor:
        """A random number of standard deviation `unit` x size for each element."""
        drawn = torch.randn(size.shape, generator=self.generator, dtype=torch.float32)  # a quarter of float64's time
        return self.unit * size * drawn

    def once(self, x: Tensor, times: float = 1.0) -> Tensor:
        return x + self.off(times * x.abs())

    def dot(self, equation: str, x: Tensor, y: Tensor, terms: Tensor | float) -> Tensor:
        """The einsum, each element of it a sum of so many terms."""
        size = torch.einsum(equation, x.abs(), y.abs()) * (1 + torch.as_tensor(terms) / 3) ** 0.5
        return torch.einsum(equation, x, y) + self.off(size)

    def softmax(self, q: Tensor, k: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """p (N, H, K), lse (N, H), keys (N, H) of q (N, H, C), k (K, H, C); `weight` (N, H, K): how often a key counts.

        An exponent is rounded in proportion to the scores whose difference it is, and once more by the factor log2(e).
        """
        scores = self.once(self.dot("nhc,khc->nhk", q, k, q.shape[2]) * scale, 2)
        keys = weight.sum(-1)
        total = self.dot("nhk,nhk->nh", weight, self.once(scores.exp(), 2), keys)
        lse = torch.where(total == 0, 1.0, total).log()
        lse = lse + self.off(2 * (1 + lse.abs()))
        exponent = scores - lse[..., None]
        exponent = exponent + self.off(2 * (scores.abs() + lse.abs()[..., None]))
        return weight * self.once(exponent.exp(), 2), torch.where(keys == 0, float("-inf"), lse), keys


def of_product(x: Tensor, y: Tensor) -> Tensor:
    """Standard deviations of x @ y."""
    return _spread(lambda r: {"": r.dot("ij,jk->ik", x.double(), y.double(), x.shape[1])})[""]


def of_attention(problem: Problem, grad_out: Tensor | None = None, grad_lse: Tensor | None = None) -> dict[str, Tensor]:
    """Standard deviations of "out" (T, H, C), "lse" (H, T) and, with grad_out (T, H, C), of each operand's gradient."""
    weight = counts(problem)
    return _spread(lambda rounding: _attention(rounding, problem, weight, grad_out, grad_lse))


def of_mass(q: Tensor, k: Tensor, span: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Standard deviations of the mass (B, H, R) of keys start .. stop and of the LSE (B, H, N).

    q (B, N, H, C), k (B, S, H, C).
    """
    q, k = q.double(), k.double()

    def draw(rounding: Rounding) -> dict[str, Tensor]:
        masses, lses = [], []
        for one_q, one_k in zip(q, k, strict=True):
            everything = torch.ones(*one_q.shape[:2], one_k.shape[0], dtype=torch.float64)
            p, lse, _ = rounding.softmax(one_q, one_k, everything, scale)
            n = one_q.shape[0]
            mass = rounding.dot("nhk,n->hk", p, torch.ones(n, dtype=torch.float64), n) / n
            masses.append(rounding.once(mass)[:, span[0] : span[1]])
            lses.append(lse.t())
        return {"mass": torch.stack(masses), "lse": torch.stack(lses)}

    spread = _spread(draw)
    return spread["mass"], spread["lse"]


def _spread(draw: Callable[[Rounding], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Root mean square of what the roundings of `DRAWS` draws change."""
    exact = {name: torch.where(x.isinf(), 0.0, x) for name, x in draw(Rounding(0.0, 0)).items()}
    squares = {name: torch.zeros_like(x) for name, x in exact.items()}
    for seed in range(DRAWS):
        for name, x in draw(Rounding(U, seed)).items():
            squares[name] += (torch.where(x.isinf(), 0.0, x) - exact[name]).square()
    return {name: (x / DRAWS).sqrt() for name, x in squares.items()}


def _attention(
    rounding: Rounding, problem: Problem, weight: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None
) -> dict[str, Tensor]:
    """Forward and the usual backward: probabilities from the LSE, delta = <grad_out, out> - grad_lse.

    `weight` (T, H, K): `counts` of the problem.
    """
    o = {name: x.detach().double() for name, x in problem.operands.items()}
    q, (queries, heads, channels) = o["q"], o["q"].shape
    scale = problem.options.get("scale") or channels**-0.5
    parts = [[n for n in names if n in o] for names in (("k", "k2", "k_ref"), ("v", "v2", "v_ref"))]
    key_heads = o[parts[0][0]].shape[1]
    group = heads // key_heads
    k, v = (torch.cat([o[n] for n in names]).repeat_interleave(group, dim=1) for names in parts)
    p, lse, keys = rounding.softmax(q, k, weight, scale)
    terms = keys[..., None]
    out = rounding.once(rounding.dot("nhk,khc->nhc", p, v, terms))
    results = {"out": out, "lse": lse.t()}
    if grad_out is None:
        return results

    g = grad_out.double()
    extra = torch.zeros(queries, heads, dtype=torch.float64) if grad_lse is None else grad_lse.double().t()
    dp = rounding.dot("nhc,khc->nhk", g, v, channels)
    delta = rounding.once(rounding.dot("nhc,nhc->nh", g, out, channels) - extra)
    ds = rounding.once(p * (dp - delta[..., None]), 2)
    results["q"] = rounding.once(scale * rounding.dot("nhk,khc->nhc", ds, k, terms), 2)
    rows = group * weight.sum(0).t()[..., None]  # so many terms has a key's gradient
    dk = rounding.once(scale * rounding.dot("nhk,nhc->khc", ds, q, rows), 2)
    dv = rounding.once(rounding.dot("nhk,nhc->khc", p, g, rows))
    for names, grad in zip(parts, (dk, dv), strict=True):
        summed = grad.unflatten(1, (key_heads, group)).sum(2)
        results |= dict(zip(names, summed.split([o[n].shape[0] for n in names]), strict=True))
    return results

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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .problems import Problem, counts

__all__ = ["assert_rounded", "of_attention", "of_lse", "of_mass", "of_product"]

U = 2.0**-24 / 3**0.5
DRAWS = 64
AT_ONCE = 2**16  # elements of a tensor whose draws are made together
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


Product = tuple[Tensor, Tensor]
"""Sums of products, and the size of what rounding adds to each of them."""


def products(equation: str, x: Tensor, y: Tensor, terms: Tensor | float) -> Product:
    """The einsum, each element of it a sum of so many terms."""
    size = torch.einsum(equation, x.abs(), y.abs()) * (1 + torch.as_tensor(terms) / 3) ** 0.5
    return torch.einsum(equation, x, y), size


class Rounding:
    """Random roundings of several draws at once, in a first dim D of every tensor; with unit 0, none."""

    def __init__(self, unit: float, seeds: Sequence[int]) -> None:
        self.unit = unit
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def near(self, x: Tensor, size: Tensor, times: float = 1.0) -> Tensor:
        """x and a random number of standard deviation `unit` x times x size for each element."""
        if self.unit == 0:
            return x
        shape = size.shape[1:]  # float32 takes a quarter of float64's time to draw
        drawn = torch.stack([torch.randn(shape, generator=g, dtype=torch.float32) for g in self.generators])
        return torch.addcmul(x, size, drawn.double(), value=self.unit * times)

    def once(self, x: Tensor, times: float = 1.0) -> Tensor:
        return self.near(x, x.abs(), times)

    def given(self, product: Product) -> Tensor:
        """One without D, of operands that are the same in every draw."""
        return self.near(*(x.expand(len(self.generators), *x.shape) for x in product))

    def dot(self, equation: str, x: Tensor, y: Tensor, terms: Tensor | float) -> Tensor:
        return self.near(*products(equation, x, y, terms))

    def logsumexp(self, products: Product, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Scores (D, N, H, K) and the finite lse (D, N, H), where no key gives 0.

        `products` (N, H, K) of q and k; `weight` (N, H, K): how often a key counts.
        """
        scores = self.once(self.given(products) * scale, 2)
        total = self.dot("nhk,...nhk->...nh", weight, self.once(scores.exp(), 2), weight.sum(-1))
        lse = torch.where(total == 0, 1.0, total).log()
        return scores, self.near(lse, 1 + lse.abs(), 2)

    def softmax(self, scores: Tensor, lse: Tensor, weight: Tensor) -> Tensor:
        """p (D, N, H, K).

        An exponent is rounded in proportion to the scores whose difference it is, and once more by the factor log2(e).
        """
        exponent = self.near(scores - lse[..., None], scores.abs() + lse.abs()[..., None], 2)
        return weight * self.once(exponent.exp(), 2)


def of_product(x: Tensor, y: Tensor) -> Tensor:
    """Standard deviations of x @ y."""
    product = products("ij,jk->ik", x.double(), y.double(), x.shape[1])
    return _spread(lambda r: {"": r.given(product)}, product[0].numel())[""]


def of_lse(problem: Problem) -> Tensor:
    """Standard deviations of the LSE (H, T)."""
    weight, product, scale = _scores(problem)
    no_key = weight.sum(-1) == 0

    def draw(rounding: Rounding) -> dict[str, Tensor]:
        return {"": torch.where(no_key, 0.0, rounding.logsumexp(product, weight, scale)[1]).mT}

    return _spread(draw, weight.numel())[""]


def of_attention(problem: Problem, grad_out: Tensor | None = None, grad_lse: Tensor | None = None) -> dict[str, Tensor]:
    """Standard deviations of "out" (T, H, C), "lse" (H, T) and, with grad_out (T, H, C), of each operand's gradient."""
    weight, product, scale = _scores(problem)
    o = {name: x.detach().double() for name, x in problem.operands.items()}
    q, (queries, heads, channels) = o["q"], o["q"].shape
    key_heads = o[_parts(o, "k")[0]].shape[1]
    group = heads // key_heads
    k, v = (_all_keys(o, kind) for kind in "kv")
    keys = weight.sum(-1)
    rows = group * weight.sum(0).t()[..., None]  # so many terms has a key's gradient
    extra = torch.zeros(queries, heads, dtype=torch.float64) if grad_lse is None else grad_lse.double().t()
    g = None if grad_out is None else grad_out.double()
    weights_of_v = None if g is None else products("nhc,khc->nhk", g, v, channels)

    def draw(rounding: Rounding) -> dict[str, Tensor]:
        """Forward and the usual backward: probabilities from the LSE, delta = <grad_out, out> - grad_lse."""
        scores, lse = rounding.logsumexp(product, weight, scale)
        p = rounding.softmax(scores, lse, weight)
        out = rounding.once(rounding.dot("...nhk,khc->...nhc", p, v, keys[..., None]))
        results = {"out": out, "lse": torch.where(keys == 0, 0.0, lse).mT}
        if g is None or weights_of_v is None:
            return results
        dp = rounding.given(weights_of_v)
        delta = rounding.once(rounding.dot("nhc,...nhc->...nh", g, out, channels) - extra)
        ds = rounding.once(p * (dp - delta[..., None]), 2)
        results["q"] = rounding.once(scale * rounding.dot("...nhk,khc->...nhc", ds, k, keys[..., None]), 2)
        dk = rounding.once(scale * rounding.dot("...nhk,nhc->...khc", ds, q, rows), 2)
        dv = rounding.once(rounding.dot("...nhk,nhc->...khc", p, g, rows))
        for kind, grad in (("k", dk), ("v", dv)):
            names = _parts(o, kind)
            summed = grad.unflatten(2, (key_heads, group)).sum(3)
            results |= dict(zip(names, summed.split([o[n].shape[0] for n in names], 1), strict=True))
        return results

    return _spread(draw, weight.numel())


def of_mass(q: Tensor, k: Tensor, span: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Standard deviations of the mass (B, H, R) of keys start .. stop and of the LSE (B, H, N).

    q (B, N, H, C), k (B, S, H, C).
    """
    items = [
        products("nhc,khc->nhk", one_q, one_k, one_q.shape[2])
        for one_q, one_k in zip(q.double(), k.double(), strict=True)
    ]
    everything = torch.ones_like(items[0][0])
    n = everything.shape[0]

    def draw(rounding: Rounding) -> dict[str, Tensor]:
        masses, lses = [], []
        for product in items:
            scores, lse = rounding.logsumexp(product, everything, scale)
            p = rounding.softmax(scores, lse, everything)
            mass = rounding.dot("...nhk,n->...hk", p, torch.ones(n, dtype=torch.float64), n) / n
            masses.append(rounding.once(mass)[..., span[0] : span[1]])
            lses.append(lse.mT)
        return {"mass": torch.stack(masses, 1), "lse": torch.stack(lses, 1)}

    spread = _spread(draw, everything.numel())
    return spread["mass"], spread["lse"]


def _spread(draw: Callable[[Rounding], dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """Root mean square of what the roundings of `DRAWS` draws change; a draw's largest tensors have `size` elements."""
    exact = draw(Rounding(0.0, [0]))
    squares = {name: torch.zeros_like(x[0]) for name, x in exact.items()}
    together = max(1, min(DRAWS, AT_ONCE // max(1, size)))
    for first in range(0, DRAWS, together):
        for name, x in draw(Rounding(U, range(first, min(first + together, DRAWS)))).items():
            squares[name] += (x - exact[name]).square().sum(0)
    return {name: (x / DRAWS).sqrt() for name, x in squares.items()}


def _parts(operands: dict[str, Tensor], kind: str) -> list[str]:
    return [name for name in (kind, f"{kind}2", f"{kind}_ref") if name in operands]


def _all_keys(operands: dict[str, Tensor], kind: str) -> Tensor:
    """Those, or the values, of every part, one for each query head (K, H, C)."""
    every = torch.cat([operands[name].detach().double() for name in _parts(operands, kind)])
    return every.repeat_interleave(operands["q"].shape[1] // every.shape[1], dim=1)


def _scores(problem: Problem) -> tuple[Tensor, Product, float]:
    """How often each key counts (T, H, K), the products of queries and keys, the scale."""
    q = problem.operands["q"].detach().double()
    channels = q.shape[2]
    product = products("nhc,khc->nhk", q, _all_keys(problem.operands, "k"), channels)
    return counts(problem), product, problem.options.get("scale") or channels**-0.5

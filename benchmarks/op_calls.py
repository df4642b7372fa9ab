"""The calls that `bench_ops` times: operands, what this library makes of them, and a result's distance from float64."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_ref_attn.functional import attention_mass, gather_attention
from sparse_ref_attn.ops.with_lse import attention_with_lse

from .op_shapes import OpShape

__all__ = ["GATED", "Attention", "Mass"]

GATED = 64  # queries whose float64 truth is computed


class Attention:
    """One shape of gather_attention: q, k, v (1, N, H, C), the bank (R, H, C), kept rows; `rows` None keeps all."""

    op = "gather_attention"

    def __init__(self, shape: OpShape, share: float, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

        n, r, h, c = shape.queries, shape.bank, shape.heads, shape.channels
        self.shape, self.device = shape, device
        self.q, self.k, self.v = (normal(1, n, h, c) for _ in range(3))
        self.k_ref, self.v_ref = normal(r, h, c), normal(r, h, c)
        kept = torch.randperm(r, generator=generator)[: max(1, round(share * r))]
        self.rows: Tensor | None = kept.sort().values.to(device)
        self.grad = normal(1, n, h, c).detach()

    def dense(self) -> Attention:
        """The same call with every row of the bank."""
        other = copy(self)
        other.rows = None
        return other

    @property
    def kept(self) -> int:
        """Rows of the bank that are attended to."""
        return self.shape.bank if self.rows is None else self.rows.shape[0]

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return self.shape.flops(self.kept)

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.q, self.k, self.v, self.k_ref, self.v_ref]

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (1, ., H, C) with the kept rows of the bank after the dense ones."""
        k_ref, v_ref = self.k_ref, self.v_ref
        if self.rows is not None:
            k_ref, v_ref = k_ref.index_select(0, self.rows), v_ref.index_select(0, self.rows)
        return self.q, torch.cat([self.k, k_ref[None]], 1), torch.cat([self.v, v_ref[None]], 1)

    def ours(self, backend: str) -> Tensor:
        """This library, (1, N, H, C)."""
        return gather_attention(
            self.q, self.k, self.v, self.k_ref, self.v_ref, self.rows, backend=backend, distinct=True
        )

    def plain(self) -> Tensor:
        """The formula in the operands' precision, for the first queries."""
        return self._formula(*(x.detach() for x in self.joined()))

    def error(self, out: Tensor) -> float:
        """Distance of the first queries from float64."""
        truth = self._formula(*(x.detach().double() for x in self.joined()))
        return float((out[:, :GATED].detach().double() - truth).abs().max())

    @staticmethod
    def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q[:, :GATED].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


class Mass:
    """One shape of attention_mass: the generation's q (1, N, H, C), all keys (1, S, H, C), the references' span."""

    op = "attention_mass"

    def __init__(self, call: Attention) -> None:
        shape = call.shape
        self.shape, self.device = shape, call.device
        self.keys = torch.cat([call.k, call.k_ref[None]], 1).detach()
        self.q = call.q.detach()[:, shape.text :]
        self.span = (shape.queries, shape.queries + shape.bank)
        self.kept = shape.bank

    @property
    def flops(self) -> float:
        """Of the one matrix product with all keys that a method needs which is not given the LSE."""
        return self._product(self.keys.shape[1])

    @property
    def flops_with_lse(self) -> float:
        """Of the product with the references' own keys, which is left where the LSE is given."""
        return self._product(self.span[1] - self.span[0])

    def _product(self, keys: int) -> float:
        return 2.0 * self.q.shape[1] * keys * self.shape.heads * self.shape.channels

    def ours(self, backend: str, query_stride: int = 1, lse: Tensor | None = None) -> Tensor:
        """This library, (1, H, R); with the LSE (1, H, N) of the step's own attention, or without."""
        return attention_mass(self.q, self.keys, self.span, backend=backend, query_stride=query_stride, lse=lse)

    def lse(self) -> Tensor | None:
        """What the step's own attention, PyTorch's, says beside its output, (1, H, N); None where it does not."""
        q, k = self.q.transpose(1, 2), self.keys.transpose(1, 2)
        with torch.no_grad():
            return attention_with_lse(lambda: scaled_dot_product_attention(q, k, k).transpose(1, 2), self.q, self.keys)[
                1
            ]

    def plain(self) -> Tensor:
        """The formula in the operands' precision, for the first head, (1, 1, R)."""
        return self._formula(self.q, self.keys)

    def error(self, mass: Tensor) -> float:
        """Distance of the first head from float64, in units of the mean mass of a key."""
        truth = self._formula(self.q.double(), self.keys.double())
        return float((mass[:, :1].double() - truth).abs().max()) * self.keys.shape[1]

    def _formula(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q[0, :, 0] @ k[0, :, 0].t() * q.shape[-1] ** -0.5
        return scores.softmax(-1)[:, slice(*self.span)].mean(0)[None, None]


class TileMass(Mass):
    """The same per tile of `size` queries, the mean over the heads, (1, T, R)."""

    def __init__(self, call: Attention, size: int) -> None:
        super().__init__(call)
        rows = self.q.shape[1]
        self.size, self.host = size, [*range(0, rows, size), rows]
        self.tiles = torch.tensor(self.host, dtype=torch.int32, device=self.device)

    def ours(self, backend: str, query_stride: int = 1, lse: Tensor | None = None) -> Tensor:
        """This library; every query of a tile counts."""
        tiles = {"tiles": self.tiles, "host": self.host, "reduce_heads": True}
        return attention_mass(
            self.q, self.keys, self.span, backend=backend, query_stride=query_stride, lse=lse, **tiles
        )

    def plain(self) -> Tensor:
        """The formula in the operands' precision, for the first and the last tile, (1, 2, R)."""
        return self._formula(self.q, self.keys)

    def error(self, mass: Tensor) -> float:
        """Distance of the first and the last tile from float64, in units of the mean mass of a key."""
        truth = self._formula(self.q.double(), self.keys.double())
        return float((mass[:, [0, -1]].double() - truth).abs().max()) * self.keys.shape[1]

    def _formula(self, q: Tensor, k: Tensor) -> Tensor:
        ends = (q[0, : self.size], q[0, self.host[-2] :])
        scores = [torch.einsum("nhc,shc->hns", rows, k[0]) * q.shape[-1] ** -0.5 for rows in ends]
        return torch.stack([s.softmax(-1)[..., slice(*self.span)].mean((0, 1)) for s in scores])[None]

"""Outputs at a real shape in full, and small cases that gather: the kernels against float64, on the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.functional import attention_mass, attention_mass_varlen, gather_attention, pack_rows, unpack_rows

from .lines import Lines
from .op_calls import Attention
from .op_rivals import by_hand
from .op_shapes import OpShape

__all__ = ["gathers", "launches", "outputs"]

OWN = ("triton", "cuda")
NAMES = ("out", "q", "k", "v", "k_ref", "v_ref")
REPEATS = 20


def outputs(lines: Lines, device: torch.device, dtype: torch.dtype, shape: OpShape, repeats: int = REPEATS) -> int:
    """Output and every gradient, all elements, beside FlashAttention 2 (PyTorch's) and float64; 1 where one fails."""
    call = Attention(shape, 0.25, device, dtype)
    truth = _truth(call)
    flash = _results(call, by_hand(call, SDPBackend.FLASH_ATTENTION))
    bad = 0
    for backend in OWN:
        try:
            first = _results(call, lambda backend=backend: call.ours(backend))
        except ConfigError as error:
            lines.add(backend=backend, skipped=str(error))
            continue
        same = dict.fromkeys(NAMES, 0)
        for _ in range(repeats):
            again = _results(call, lambda backend=backend: call.ours(backend))
            for name, one, other in zip(NAMES, first, again, strict=True):
                same[name] += torch.equal(one, other)
        for name, ours, theirs, exact in zip(NAMES, first, flash, truth, strict=True):
            error, allowed = _apart(ours, exact), _apart(theirs, exact)
            limit = 2 * allowed + torch.finfo(dtype).eps * float(exact.abs().max())
            ok = error <= limit and same[name] == repeats
            lines.add(
                backend=backend, tensor=name, error=error, error_of_fa2=allowed, allowed=limit,
                apart_from_fa2=_apart(ours, theirs), same_bits=same[name], repeats=repeats, ok=ok,
            )  # fmt: skip
            bad += not ok
    return int(bad > 0)


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; NaN where there is one, which no comparison lets pass."""
    return float((one.detach().double() - other.detach().double()).abs().max())


def _results(call: Attention, run: Callable[[], Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        out = run()
        return [out.detach(), *torch.autograd.grad(out, call.leaves, call.grad)]


def _truth(call: Attention) -> list[Tensor]:
    """The output and the gradients by their formulas in float64, head by head."""
    q, k, v = (x.detach()[0] for x in call.joined())
    scale, queries = q.shape[-1] ** -0.5, call.shape.queries
    out, dq = (torch.empty_like(q, dtype=torch.float64) for _ in range(2))
    dk, dv = (torch.empty_like(k, dtype=torch.float64) for _ in range(2))
    for h in range(q.shape[1]):
        one, keys, values, grad = (x[:, h].double() for x in (q, k, v, call.grad[0]))
        p = (one @ keys.t() * scale).softmax(-1)
        out[:, h] = p @ values
        ds = p * (grad @ values.t() - (grad * out[:, h]).sum(-1, keepdim=True))
        dq[:, h], dk[:, h], dv[:, h] = scale * ds @ keys, scale * ds.t() @ one, p.t() @ grad
    banks = []
    for grad, bank in ((dk, call.k_ref), (dv, call.v_ref)):
        whole = torch.zeros_like(bank, dtype=torch.float64)
        banks.append(whole.index_copy(0, call.rows, grad[queries:]))
    return [out[None], dq[None], dk[None, :queries], dv[None, :queries], *banks]


def gathers(lines: Lines, device: torch.device, dtype: torch.dtype) -> int:
    """Small ragged cases that read rows by index, forward and backward; 1 where one is wrong."""
    bad = 0
    for backend, (name, case) in product(OWN, _cases(device, dtype)):
        try:
            got, want = case(backend), case("reference")
        except ConfigError as error:
            lines.add(backend=backend, case=name, skipped=str(error))
            continue
        error = max(_apart(one, other) / max(1e-9, float(other.double().abs().max())) for one, other in
                    zip(got, want, strict=True))  # fmt: skip
        ok = error <= 16 * torch.finfo(dtype).eps
        lines.add(backend=backend, case=name, error=error, ok=ok)
        bad += not ok
    return int(bad > 0)


Case = Callable[[str], list[Tensor]]


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, 2, 64, generator=generator).to(device, dtype).requires_grad_()

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q, k, v, k_ref, v_ref = (normal(n) for n in (103, 45, 45, 100, 100))
    weight = normal(103).detach()
    drawn = torch.randint(100, (70,), generator=generator).int().to(device)
    ragged = {"cu_seqlens_q": integers(0, 70, 103), "cu_seqlens_k": integers(0, 40, 45)}

    def attend(offsets: Tensor) -> Case:
        def run(backend: str) -> list[Tensor]:
            with torch.enable_grad():
                out = gather_attention(
                    q, k, v, k_ref, v_ref, drawn, ref_offsets=offsets, backend=backend, **ragged
                )  # fmt: skip
                return [out.detach(), *torch.autograd.grad(out, [q, k, v, k_ref, v_ref], weight)]

        return run

    def mass(backend: str) -> list[Tensor]:
        keys, starts = k_ref.detach(), integers(10, 80)
        cu_k, cu_ref = integers(0, 60, 100), integers(0, 50, 70)
        return [
            attention_mass_varlen(
                q.detach(), keys, ragged["cu_seqlens_q"], cu_k, cu_ref, starts, 70, backend=backend
            )
        ]  # fmt: skip

    def per_tile(backend: str) -> list[Tensor]:
        tiles = integers(0, 16, 32, 32, 37, 103)
        masses = partial(attention_mass, q.detach()[None], k_ref.detach()[None], (20, 100), tiles=tiles)
        return [masses(reduce_heads=reduced, backend=backend) for reduced in (False, True)]

    def rows(backend: str) -> list[Tensor]:
        chosen = torch.arange(0, 100, 3, device=device)
        packed = pack_rows(k_ref.detach(), chosen, 0, backend=backend)
        return [packed, unpack_rows(packed, chosen, 100, 0, backend=backend)]

    yield "rows named twice, a ragged batch", attend(integers(0, 65, 70))
    yield "a selection per key head", attend(torch.stack([integers(0, 30, 40), integers(40, 40, 70)]))
    yield "attention_mass", mass
    yield "attention_mass per tile", per_tile
    yield "pack_rows", rows


def launches(lines: Lines, device: torch.device, dtype: torch.dtype, shape: OpShape) -> int:
    """Every attention kernel once at a real shape, for a profiler that looks on."""
    call = Attention(shape, 0.25, device, dtype)
    for backend in OWN:
        try:
            _results(call, lambda backend=backend: call.ours(backend))
        except ConfigError as error:
            lines.add(backend=backend, skipped=str(error))
    return 0

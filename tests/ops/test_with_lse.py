"""The LSE of somebody else's attention: same bits, the right numbers, and none where it cannot be trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparse_ref_attn.functional import attention_mass
from sparse_ref_attn.ops import with_lse
from sparse_ref_attn.ops.attention_mass.reference import attention_mass_reference
from sparse_ref_attn.ops.with_lse import attention_with_lse, forget_proofs


@pytest.fixture(autouse=True)
def unproved() -> Iterator[None]:
    forget_proofs()
    yield
    forget_proofs()


def draw(dtype: torch.dtype = torch.float32, queries: int = 100, keys: int = 130) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 3, 32, generator=generator).to(dtype) for n in (queries, keys, keys))  # type: ignore[return-value]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Callable[[], Tensor]:
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: scaled_dot_product_attention(*heads, attn_mask=mask, **options).transpose(1, 2)


def mask_of(kind: str | None, dtype: torch.dtype) -> Tensor | None:
    keep = torch.rand(2, 1, 1, 130, generator=torch.Generator().manual_seed(1)) > 0.3
    if kind == "additive":
        return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, float("-inf"))
    return keep if kind == "bool" else None


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", [None, "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_of_the_caller_and_the_mass_of_float64(dtype: torch.dtype, kind: str | None, inference: bool) -> None:
    q, k, v = draw(dtype)
    mask = mask_of(kind, dtype)
    keep = None if kind is None else mask_of("bool", dtype)[:, 0, 0]  # type: ignore[index]
    want = attend(q, k, v, mask)()
    with torch.inference_mode(inference):
        for _ in range(2):  # the first is compared with float64, the second believed
            out, lse = attention_with_lse(attend(q, k, v, mask), q, k, mask)
            assert torch.equal(out, want)
            assert out.stride() == want.stride()
            assert lse is not None
            mass = attention_mass(q, k, (90, 130), key_mask=keep, lse=lse)
    truth = attention_mass_reference(q.double(), k.double(), (90, 130), 32**-0.5, keep)
    allowed = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}[dtype]
    assert float((mass - truth).abs().max()) <= allowed * float(truth.max())


def test_gradients_are_those_of_the_caller() -> None:
    leaves, others = ([x.requires_grad_() for x in draw()] for _ in range(2))
    want = torch.autograd.grad(attend(*leaves)().square().sum(), leaves)
    out, lse = attention_with_lse(attend(*others), others[0], others[1])
    got = torch.autograd.grad(out.square().sum(), others)
    assert lse is not None
    assert not lse.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_attention_that_is_something_else_keeps_its_lse_for_itself() -> None:
    q, k, v = draw()
    cases = {
        "of other keys": attend(q, k.roll(1, 1), v),
        "of other queries": attend(q * 1.5, k, v),
        "changed afterwards": lambda: attend(q, k, v)() * 1.0,
        "twice": lambda: attend(q, k, v)() + attend(q, k, v)(),
        "by hand": lambda: (torch.einsum("bnhc,bshc->bhns", q, k).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2),
        "at another scale": attend(q, k, v, scale=0.5),
        "causal": attend(q, k, v, is_causal=True),
    }
    for name, own in cases.items():
        forget_proofs()
        out, lse = attention_with_lse(own, q, k)
        assert torch.equal(out, own()), name
        assert lse is None, name
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_with_lse(attend(q, k, v), q, k)[1] is None
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_with_lse(attend(q, k, v), q, k)[1] is None


def test_a_kernel_that_says_something_else_than_the_lse_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw()

    def in_bits(name: str, func: Any, args: Any, kwargs: Any) -> Any:
        out, lse = func(*args, **kwargs)
        return out, lse / 0.6931471805599453  # base 2

    monkeypatch.setattr(with_lse, "_asked", in_bits)
    out, lse = attention_with_lse(attend(q, k, v), q, k)
    assert torch.equal(out, attend(q, k, v)())
    assert lse is None


@pytest.mark.parametrize("changes", [False, True])
def test_a_kernel_is_asked_for_its_lse_only_if_its_bits_stay(changes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel with a flag, as cuDNN's: asked, this one computes the same bits or others."""
    asked = []

    class Kernel:
        def __call__(self, q: Tensor, k: Tensor, v: Tensor, flag: bool) -> tuple[Tensor, Tensor]:
            asked.append(flag)
            out = attend(q, k, v)()
            return (out + 1e-6 if changes and flag else out), q.new_ones(2) if flag else q.new_empty(0)

    monkeypatch.setitem(with_lse.KERNELS, "flagged", 3)
    kernel, (q, k, v) = Kernel(), draw()
    results = [with_lse._asked("flagged", kernel, (q, k, v, False), {}) for _ in range(3)]
    assert asked == [False, True] + [not changes] * 2
    for out, lse in results:
        assert torch.equal(out, attend(q, k, v)())
        assert bool(lse.numel()) is not changes

"""Which package "flash" would take, what is said of one that cannot be taken, and all that is done around its call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.ops.attention_mass.backends import ORDER as MASS_ORDER
from sparse_ref_attn.ops.gather_attention import backends
from sparse_ref_attn.ops.gather_attention.arguments import Arguments
from sparse_ref_attn.ops.gather_attention.backends import ORDER, Call, flash_packages, reasons
from sparse_ref_attn.ops.gather_attention.gradients import Wanted
from sparse_ref_attn.ops.gather_attention.impl.flash import backward_by, forward_by
from sparse_ref_attn.ops.gather_attention.impl.flash_packages import BACKWARD, FORWARD, Lengths
from sparse_ref_attn.ops.pack_rows.backends import ORDER as ROWS_ORDER

from .problems import NAMES, Problem, grad_out, gradients, make, truth

CALL = Call(torch.device("cpu"), torch.bfloat16, 64)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that Python imports from; what is found there is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    backends._flash_module.cache_clear()
    yield tmp_path
    for written in tmp_path.glob("*.py"):
        sys.modules.pop(written.stem, None)
    backends._flash_module.cache_clear()


def test_every_package_can_be_called() -> None:
    assert list(flash_packages(CALL.device, CALL.dtype)) == list(FORWARD)
    assert set(FORWARD) - set(BACKWARD) == {"fa3_fwd_interface"}
    assert "has no backward" in flash_packages(CALL.device, CALL.dtype, backward=True)["fa3_fwd_interface"]
    assert "has no backward" not in flash_packages(CALL.device, CALL.dtype)["fa3_fwd_interface"]


def test_forward_only_package_takes_bfloat16_alone() -> None:
    half = flash_packages(CALL.device, torch.float16)
    assert "needs bfloat16, got torch.float16" in half["fa3_fwd_interface"]
    assert not any("bfloat16" in why for why in half["flash_attn_interface"])


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("flash_attn", "raise ImportError('undefined symbol: _ZN3c10\\nmore')", "cannot be imported: undefined symbol"),
        ("flash_attn", "", "must have a flash_attn_varlen_func that returns the lse"),
        ("flash_attn_interface", "def flash_attn_varlen_func(q, k, v): ...", "that returns the lse"),
        (
            "flash_attn",
            "__version__ = '2.6.3'\ndef flash_attn_varlen_func(q, return_attn_probs=False): ...",
            "must be 2.7 or later, got 2.6.3",
        ),
    ],
)
def test_a_package_that_will_not_do_is_explained(name: str, source: str, told: str, packages: Path) -> None:
    if backends.find_spec(name) is not None:
        pytest.skip(f"the real {name} is installed")
    (packages / f"{name}.py").write_text(source)
    (why,) = [line for line in flash_packages(CALL.device, CALL.dtype)[name] if "NVIDIA" not in line]
    assert told in why


def test_limits_of_flash() -> None:
    assert any("multiple of 8 and at most 256, got 264" in why for why in reasons("flash", CALL._replace(channels=264)))
    wide = CALL._replace(channels=256)
    assert not any("head dim" in why for why in reasons("flash", wide))
    assert any("at most 248, got 256" in why for why in reasons("flash", wide._replace(gradients=True)))
    assert any("multiple of 16 bytes" in why for why in reasons("flash", CALL._replace(aligned=False)))
    with pytest.raises(ConfigError, match="flash: needs a CUDA device, got cpu"):
        make(((2,),), ((3,),), None).to(torch.bfloat16).run("flash")


def test_auto_takes_nothing_unproved_without_a_verdict() -> None:
    """What it tries where nothing was measured; with a verdict, what agreed (tests/ops/test_verdicts.py)."""
    for order in (ORDER, MASS_ORDER, ROWS_ORDER):
        assert not {"triton", "flash", "flex"} & {name for row in order.values() for name in row}


def scores(q: Tensor, k: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """Of all queries with all keys (H, T, K), -inf where they belong to different items."""
    item_q, item_k = (
        torch.cat([torch.full((b - a,), item) for item, (a, b) in enumerate(pairwise(cu.tolist()))])
        for cu in (lengths.cu_q, lengths.cu_k)
    )
    s = torch.einsum("nhc,khc->hnk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * scale
    return s.masked_fill(item_q[:, None] != item_k, float("-inf"))


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    """Attention as a package is asked for it: an empty row is zero, and its lse +inf as flash-attn 2 has it."""
    assert lengths.cu_q.dtype == lengths.cu_k.dtype == torch.int32
    assert max(lengths.cu_q.diff()) <= lengths.max_q
    assert max(lengths.cu_k.diff()) <= lengths.max_k
    s = scores(q, k, lengths, scale)
    lse = s.logsumexp(-1)
    lse = torch.where(lse.isinf(), float("inf"), lse)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hnk,khc->nhc", (s - lse[..., None]).exp(), v), lse


def plain_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, from no more than a package is given: delta = rowsum(dO * O)."""
    assert all(x.is_contiguous() for x in (grad_out, lse))
    group = q.shape[1] // k.shape[1]
    k_all, v_all = (x.repeat_interleave(group, dim=1) for x in (k, v))
    p = (scores(q, k, lengths, scale) - lse[..., None]).exp()
    delta = (grad_out * out).sum(-1).t()
    ds = p * (torch.einsum("nhc,khc->hnk", grad_out, v_all) - delta[..., None]) * scale
    dk, dv = torch.einsum("hnk,nhc->khc", ds, q), torch.einsum("hnk,nhc->khc", p, grad_out)
    return torch.einsum("hnk,khc->nhc", ds, k_all), *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))


@pytest.mark.parametrize(
    "problem",
    [
        make(((7, 1, 4),), ((5, 2, 9),), (3, 0, 6), 6),
        make(((2, 3), (4, 5)), ((3, 1), (2, 6)), (2, 4), 5, heads=4, key_heads=2),
        make(((2, 3, 0),), ((3, 0, 2),), (2, 4, 1), 5, second=(4, 2, 0)),
        make(((3, 2, 1),), ((0, 4, 0),), (0, 0, 3), 5),  # an item without keys
        make(((5, 3),), None, (6, 5), 3, repeats=True),
        make(((0, 0),), ((4, 1),), None),
        make(((3, 2),), ((0, 0),), (0, 0), 5),
    ],
)
@pytest.mark.parametrize("through_lse", [False, True])
def test_what_is_done_around_a_package(problem: Problem, through_lse: bool) -> None:
    exact = problem.leaves()
    want = truth(exact)
    layout = [problem.layout.get(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "ref_indices", "ref_offsets")]
    a = Arguments(*(problem.operands.get(n) for n in NAMES), *layout, problem.operands["q"].shape[2] ** -0.5, False)
    out, lse = forward_by(plain, a)
    torch.testing.assert_close((out, lse), want, rtol=1e-12, atol=1e-12)
    expected = gradients(exact, want[0], want[1] if through_lse else None)
    grad_lse = torch.where(lse.isinf(), 0.0, grad_out(lse, 2)) if through_lse else None
    got = backward_by(plain_backward, a, grad_out(out), grad_lse, out, lse, Wanted(True, True, True))
    for name, grad in zip(NAMES, got, strict=True):
        assert (grad is None) == (name not in expected)
        if grad is not None:
            torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)

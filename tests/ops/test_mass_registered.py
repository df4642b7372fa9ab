"""attention_mass: the LSE given, value norms, ragged batches, and how it sits in torch. Truth is float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.functional import attention_mass, attention_mass_varlen, gather_attention
from sparse_ref_attn.ops.attention_mass.registered import mass_op, mass_varlen_op

from .rounding import assert_rounded, of_mass

CPU_BACKENDS = ["auto", "reference", "chunked"]


def draw(queries: int, keys: int, heads: int = 3, C: int = 16, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    return tuple(torch.randn(batch, n, heads, C, generator=generator) for n in (queries, keys))


def block(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax matrix (B, H, N, S) and LSE (B, H, N), in float64."""
    scores = torch.einsum("bnhc,bshc->bhns", q.double(), k.double()) * scale
    return scores.softmax(-1), scores.logsumexp(-1)


@pytest.mark.parametrize("stride", [1, 3])
def test_a_given_lse_stands_for_all_keys(stride: int):
    q, k = draw(63, 100)
    weights, lse = block(q, k, 0.3)
    truth = weights[:, :, ::stride, 40:].mean(2)
    deviation = of_mass(q[:, ::stride], k, (40, 100), 0.3)[0]
    for backend in CPU_BACKENDS:
        mass = attention_mass(q, k, (40, 100), scale=0.3, query_stride=stride, lse=lse.float(), backend=backend)
        assert_rounded(mass, truth, deviation, backend)


def test_the_lse_of_gather_attention_is_the_one_it_takes():
    q, k = draw(20, 30, batch=1)
    _, lse = gather_attention(q, k, k, return_lse=True)
    given = attention_mass(q, k, (10, 30), lse=lse.reshape(1, 3, 20))
    assert_rounded(given, block(q, k, 0.25)[0][..., 10:].mean(2), of_mass(q, k, (10, 30), 0.25)[0])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_query_without_keys_adds_nothing(backend: str):
    q, k = draw(4, 6)
    lse = block(q, k, 0.25)[1].float()
    lse[:, :, 1] = float("-inf")
    expected = block(q, k, 0.25)[0][:, :, [0, 2, 3]].sum(2) / 4
    mass = attention_mass(q, k, (0, 6), lse=lse, backend=backend)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-7)


def test_value_norms_weigh_and_heads_reduce():
    q, k = draw(20, 30)
    v = torch.randn(2, 30, 3, 8, generator=torch.Generator().manual_seed(3))
    expected = block(q, k, 0.25)[0][..., 10:].mean(2) * v[:, 10:].double().pow(2).sum(-1).sqrt().transpose(1, 2)
    mass = attention_mass(q, k, (10, 30), value=v)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-7)
    reduced = attention_mass(q, k, (10, 30), value=v, reduce_heads=True)
    torch.testing.assert_close(reduced, mass.mean(1))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ragged_items_equal_each_alone(backend: str, given: bool):
    counts = torch.tensor([[5, 9, 4], [0, 3, 1], [7, 6, 0], [1, 8, 8]])  # queries, keys, references
    offsets = torch.cat([torch.zeros(1, 3, dtype=torch.long), counts.cumsum(0)]).t().to(torch.int32).contiguous()
    starts = torch.tensor([3, 10, 12, 18], dtype=torch.int32)  # anywhere among the item's keys
    q, k = (x[0] for x in draw(13, 26, batch=1))
    expected, lses = [], []
    for item, (_, _, r) in enumerate(counts.tolist()):
        (q0, k0), (q1, k1) = (offsets[:2, i].tolist() for i in (item, item + 1))
        weights, lse = block(q[None, q0:q1], k[None, k0:k1], 0.25)
        first = int(starts[item]) - k0
        lses.append(lse[0])
        expected.append(weights[0, ..., first : first + r].sum(1) / max(q1 - q0, 1))
    lse = torch.cat(lses, 1).float() if given else None
    mass = attention_mass_varlen(q, k, *offsets, starts, 13, lse=lse, backend=backend)
    torch.testing.assert_close(mass.double(), torch.cat(expected, -1), rtol=1e-5, atol=1e-7)


def test_bad_input_is_refused_in_words():
    q, k = draw(4, 6)
    with pytest.raises(LayoutError, match=r"lse must be \(B, H, N\) = \(2, 3, 4\)"):
        attention_mass(q, k, (0, 6), lse=torch.zeros(2, 4, 3))
    with pytest.raises(LayoutError, match="value must have the rows of k"):
        attention_mass(q, k, (0, 6), value=q)
    with pytest.raises(ConfigError, match=r"backend must be one of .*'triton'.*got 'fast'"):
        attention_mass(q, k, (0, 6), backend="fast")
    with pytest.raises(ConfigError, match=r"triton: .*needs a CUDA device"):
        attention_mass(q, k, (0, 6), backend="triton")
    i = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(LayoutError, match=r"ref_starts must be \(1,\) int32"):
        attention_mass_varlen(q[0], k[0], i, i, i, torch.zeros(1), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": (0, 1, 9)}, r"cu_seqlens_q must run from 0 to 3 without decreasing, got \[0, 1, 9\]"),
        ({"cu_seqlens_q": (0, 4, 3)}, "cu_seqlens_q must run from 0 to 3"),
        ({"cu_seqlens_k": (1, 4, 8)}, "cu_seqlens_k must run from 0 to 8"),
        ({"cu_seqlens_ref": (0, 1, 2)}, "cu_seqlens_ref must run from 0 to 3"),
        ({"ref_starts": (-3, 6)}, "item 0 must lie among its keys, rows 0 to 4 of k, got rows -3 to -2"),
        ({"ref_starts": (3, 7)}, "item 1 must lie among its keys, rows 4 to 8 of k, got rows 7 to 9"),
        ({"max_seqlen_q": 1}, "max_seqlen_q must be at least the longest item's 2 rows of cu_seqlens_q, got 1"),
        ({"max_seqlen_ref": 1}, "max_seqlen_ref must be at least the longest item's 2 rows"),
    ],
)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_offsets_that_do_not_fit_are_refused(changes: dict[str, object], message: str, backend: str):
    offsets = {"cu_seqlens_q": (0, 1, 3), "cu_seqlens_k": (0, 4, 8), "cu_seqlens_ref": (0, 1, 3), "ref_starts": (3, 6)}
    given = {**offsets, **changes}
    given = {n: torch.tensor(x, dtype=torch.int32) if isinstance(x, tuple) else x for n, x in given.items()}
    q, k = torch.randn(3, 1, 16), torch.randn(8, 1, 16)
    with pytest.raises(LayoutError, match=message):
        attention_mass_varlen(q, k, **given, total_ref=3, backend=backend)


def test_opcheck():
    q, k = draw(5, 7)
    mask = torch.rand(2, 7) > 0.2
    lse = block(q, k, 0.25)[1].float()
    torch.library.opcheck(mass_op, (q, k, 2, 7, 0.25, None, None, 1, "auto"))
    torch.library.opcheck(mass_op, (q, k, 2, 7, 0.25, mask, lse, 2, "chunked"))
    i = torch.tensor([0, 5], dtype=torch.int32)
    args = (q[0], k[0], i, i + i // 5 * 2, i, i[:1] + 2, 5, 5, 5, 0.25, None, 1, "auto")
    torch.library.opcheck(mass_varlen_op, args)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles_whole_and_once_for_all_lengths(backend: str):
    """Inductor has the op alone: a mean over heads would be C++ of its own, and of no claim."""
    reduce_heads = backend != "inductor"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attention_mass, fullgraph=True, dynamic=True, backend=backend)
    counter = torch._dynamo.utils.counters["stats"]
    for queries, keys in ((20, 30), (33, 47), (64, 100)):
        q, k = draw(queries, keys)
        mass = compiled(q, k, (keys // 3, keys), reduce_heads=reduce_heads)
        torch.testing.assert_close(mass, attention_mass(q, k, (keys // 3, keys), reduce_heads=reduce_heads))
    assert counter["unique_graphs"] == 1

"""Attention mass against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from sparse_ref_attn.errors import LayoutError
from sparse_ref_attn.functional import attention_mass
from sparse_ref_attn.ops.attention_mass.impl import chunked

# Float32 end to end: the relative error of exp is the score's absolute error, a few ulp of scores up to about 20.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-8}


def truth(q, k, span, scale=None, mask=None):
    """Column means of the softmax matrix, one query at a time, in float64."""
    batch, queries, heads, channels = q.shape
    scale = channels**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, span[1] - span[0], dtype=torch.float64)
    for b in range(batch):
        allowed = torch.ones(k.shape[1], dtype=torch.bool) if mask is None else mask[b]
        for h in range(heads):
            for j in range(queries):
                weights = torch.exp(scale * (k[b, :, h].double() @ q[b, j, h].double())) * allowed
                out[b, h] += (weights / weights.sum())[span[0] : span[1]]
    return out / queries


def draw(batch, queries, keys, heads, channels, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, heads, channels, generator=random)
    return q.to(dtype), torch.randn(batch, keys, heads, channels, generator=random).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 63), (63, 100), (100, 129), (129, 64)])
def test_equals_the_definition_in_float64(dtype, queries, keys):
    q, k = draw(2, queries, keys, 3, 32, dtype)
    span = (keys // 3, keys)
    mass = attention_mass(q, k, span)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), truth(q, k, span), **TOLERANCE)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_size_of_a_chunk_changes_nothing(rows, monkeypatch):
    q, k = draw(2, 100, 63, 2, 16)
    mask = torch.rand(2, 63, generator=torch.Generator().manual_seed(1)) > 0.3
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", rows * 4 * 63)
    mass = attention_mass(q, k, (5, 60), key_mask=mask)
    torch.testing.assert_close(mass.double(), truth(q, k, (5, 60), mask=mask), **TOLERANCE)


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1e4])
def test_scores_of_any_size_stay_finite(magnitude):
    q, k = draw(1, 63, 129, 2, 64)
    mass = attention_mass(q * magnitude, k, (0, 129))
    assert mass.isfinite().all()
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2), rtol=1e-5, atol=0)
    if magnitude == 1e4:  # a hard maximum: each query's mass is on its best key
        best = torch.einsum("bnhc,bshc->bhns", q, k).argmax(-1)
        counts = torch.nn.functional.one_hot(best, 129).sum(2) / 63
        torch.testing.assert_close(mass, counts.float(), rtol=0, atol=1e-3)


def test_rows_sum_to_the_share_of_the_span_and_split_spans_add_up():
    q, k = draw(1, 40, 90, 2, 16)
    whole = attention_mass(q, k, (0, 90))
    torch.testing.assert_close(whole.sum(-1), torch.ones(1, 2))
    first, second = attention_mass(q, k, (10, 50)), attention_mass(q, k, (50, 90))
    torch.testing.assert_close(torch.cat([first, second], -1), whole[..., 10:], rtol=1e-6, atol=0)
    assert (first.sum(-1) < 1).all()


def test_a_masked_key_gets_nothing_and_the_others_share_its_part():
    q, k = draw(2, 33, 50, 2, 16)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, 20:30] = False
    mass = attention_mass(q, k, (0, 50), key_mask=mask)
    assert (mass[0, :, 20:30] == 0).all()
    without = torch.cat([k[:1, :20], k[:1, 30:]], 1)
    expected = attention_mass(q[:1], without, (0, 40))[0]
    torch.testing.assert_close(torch.cat([mass[0, :, :20], mass[0, :, 30:]], -1), expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(mass[1], attention_mass(q[1:], k[1:], (0, 50))[0])
    torch.testing.assert_close(attention_mass(q, k, (0, 50), key_mask=mask.int()), mass, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("magnitude", [1.0, 100.0])
@pytest.mark.parametrize("given", [False, True])
def test_an_item_that_may_attend_to_nothing_gets_zeros(backend, magnitude, given):
    q, k = draw(2, 9, 12, 2, 16)
    q = q * magnitude
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0] = False
    lse = torch.full((2, 2, 9), float("-inf"))
    lse[1] = (torch.einsum("nhc,shc->hns", q[1], k[1]) / 4).logsumexp(-1)
    mass = attention_mass(q, k, (4, 12), key_mask=mask, lse=lse if given else None, backend=backend)
    assert (mass[0] == 0).all()
    alone = attention_mass(q[1:], k[1:], (4, 12), backend=backend)[0]
    torch.testing.assert_close(mass[1], alone, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_queries_no_items_and_no_heads_give_zeros_of_the_right_shape(backend):
    for shape in ((2, 0, 3), (0, 4, 3), (2, 4, 0)):
        batch, queries, heads = shape
        q, k = torch.randn(batch, queries, heads, 16), torch.randn(batch, 6, heads, 16)
        mass = attention_mass(q, k, (1, 6), backend=backend)
        assert torch.equal(mass, torch.zeros(batch, heads, 5))


def test_any_strides():
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 70, 3, 4, 16, generator=random)
    q, k = qkv[:, 10:40, 0], qkv[:, :, 1].transpose(1, 2).contiguous().transpose(1, 2)
    assert not q.is_contiguous()
    assert not k.is_contiguous()
    expected = attention_mass(q.contiguous(), k.contiguous(), (3, 70))
    torch.testing.assert_close(attention_mass(q, k, (3, 70)), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(expected.double(), truth(q, k, (3, 70)), **TOLERANCE)


def test_every_nth_query_and_a_scale_of_ones_own():
    q, k = draw(1, 101, 40, 2, 16)
    torch.testing.assert_close(
        attention_mass(q, k, (0, 40), query_stride=4).double(), truth(q[:, ::4], k, (0, 40)), **TOLERANCE
    )
    torch.testing.assert_close(
        attention_mass(q, k, (0, 40), scale=0.7).double(), truth(q, k, (0, 40), 0.7), **TOLERANCE
    )


def test_items_do_not_depend_on_their_neighbours_and_runs_repeat():
    q, k = draw(3, 65, 80, 2, 16)
    together = attention_mass(q, k, (0, 80))
    assert torch.equal(together, attention_mass(q, k, (0, 80)))
    for b in range(3):
        assert torch.equal(together[b : b + 1], attention_mass(q[b : b + 1], k[b : b + 1], (0, 80)))


def test_no_gradient_is_recorded():
    q, k = draw(1, 8, 8, 1, 16)
    assert not attention_mass(q.requires_grad_(), k.requires_grad_(), (0, 8)).requires_grad


def test_shapes_on_the_meta_device():
    q, k = (torch.empty(2, n, 3, 16, device="meta", dtype=torch.bfloat16) for n in (1000, 5000))
    mass = attention_mass(q, k, (1000, 5000))
    assert (mass.shape, mass.dtype, mass.device.type) == ((2, 3, 4000), torch.float32, "meta")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(1, 4, 2, 8)}, "agree in B, H and C"),
        ({"q": torch.zeros(4, 2, 16)}, "agree in B, H and C"),
        ({"k": torch.zeros(2, 6, 2, 16)}, "agree in B, H and C"),
        ({"k": torch.zeros(1, 6, 2, 16).half()}, "share a floating dtype"),
        ({"q": torch.zeros(1, 4, 2, 16).long(), "k": torch.zeros(1, 6, 2, 16).long()}, "share a floating dtype"),
        ({"q": torch.zeros(1, 4, 2, 16, device="meta")}, "a device"),
        ({"span": (3, 3)}, "span must lie within the 6 keys"),
        ({"span": (-1, 3)}, "span must lie within the 6 keys"),
        ({"span": (0, 7)}, "span must lie within the 6 keys"),
        ({"query_stride": 0}, "query_stride must be at least 1"),
        ({"key_mask": torch.ones(1, 5, dtype=torch.bool)}, "key_mask must be bool"),
        ({"key_mask": torch.ones(1, 6)}, "key_mask must be bool"),
    ],
)
def test_bad_input_is_said_in_words(change, words):
    arguments = {"q": torch.zeros(1, 4, 2, 16), "k": torch.zeros(1, 6, 2, 16), "span": (0, 6)} | change
    with pytest.raises(LayoutError, match=words):
        attention_mass(**arguments)

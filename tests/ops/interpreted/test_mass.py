"""The mass and LSE kernels, interpreted, against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.functional import attention_mass, attention_mass_varlen
from sparse_ref_attn.ops.attention_mass.impl.triton_mass import launch_lse, launch_mass
from sparse_ref_attn.ops.attention_mass.impl.tuning import LSE, MASS
from sparse_ref_attn.ops.attention_mass.reference import attention_mass_reference
from sparse_ref_attn.ops.shared.launch_config import Config

from .. import mass_cases
from ..guards import Canaries, in_nan
from ..mass_cases import RaggedBatch, lse_of
from ..rounding import assert_rounded, of_mass
from ..tolerance import assert_as_accurate

SMALL = Config(32, 32, 4, 2)
draw = partial(mass_cases.draw, C=32)


@pytest.mark.parametrize(("C", "dtype"), [(32, torch.float32), (64, torch.float16), (128, torch.bfloat16)])
def test_shipped_tiles(C: int, dtype: torch.dtype):
    q, k = draw(129, 200, heads=1, C=C, dtype=dtype)
    scale = C**-0.5
    truth = lse_of(q.double(), k.double(), scale)
    start = 71  # the block of reference rows ends within a tile
    deviation, lse_deviation = of_mass(q, k, (start, 200), scale)
    for config in {LSE[capability, C] for capability in (80, 90)}:
        with Canaries():
            lse = launch_lse(q, k, scale, 1, config)
        assert_rounded(lse, truth, lse_deviation, "lse")
    truth_mass = attention_mass_reference(q.double(), k.double(), (start, 200), scale)
    for config in {MASS[capability, C] for capability in (80, 90)}:
        with Canaries():
            mass = launch_mass(q, k[:, start:], truth.float(), scale, 1, config)
        assert_rounded(mass, truth_mass, deviation, "mass")


@pytest.mark.parametrize(
    ("queries", "keys", "start", "dtype"),
    [
        (1, 2, 1, torch.float16),
        (1, 31, 30, torch.float32),
        (31, 66, 0, torch.bfloat16),
        (66, 16, 5, torch.float32),
        (65, 33, 32, torch.float16),
    ],
)
def test_odd_sizes(queries: int, keys: int, start: int, dtype: torch.dtype):
    q, k = draw(queries, keys, dtype=dtype, batch=2)
    with Canaries():
        lse = launch_lse(q, k, 0.2, 1, SMALL)
        mass = launch_mass(q, k[:, start:], lse, 0.2, 1, SMALL)
    truth = attention_mass_reference(q.double(), k.double(), (start, keys), 0.2)
    assert_rounded(mass, truth, of_mass(q, k, (start, keys), 0.2)[0])
    assert (mass.sum(-1) <= 1 + 1e-3).all()


def test_a_lone_key_takes_all():
    q, k = draw(5, 1)
    torch.testing.assert_close(attention_mass(q, k, (0, 1), backend="triton"), torch.ones(1, 2, 1))


def test_masked_keys_get_nothing_and_a_query_without_keys_stays_finite():
    q, k = draw(33, 70, batch=3)
    mask = torch.rand(3, 70, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[1] = False  # whole item without keys
    mask[2, :64] = False  # the first tiles hold no live key
    k = torch.where(mask[..., None, None], k, torch.full_like(k, 50.0))  # a masked key would win
    with Canaries():
        lse = launch_lse(q, k, 0.2, 1, SMALL, mask)
        mass = launch_mass(q, k[:, 30:], lse, 0.2, 1, SMALL, mask[:, 30:])
    assert (lse[1] == float("-inf")).all()
    assert (mass[1] == 0).all()
    assert (mass.transpose(1, 2)[~mask[:, 30:]] == 0).all()
    for item in (0, 2):
        live = mask[item]
        truth = attention_mass_reference(
            q[item, None].double(), k[item, live][None].double(), (0, int(live.sum())), 0.2
        )
        low = attention_mass_reference(q[item, None], k[item, live][None], (0, int(live.sum())), 0.2)
        inside = live[30:].sum()
        got = mass[item][:, live[30:]]
        assert_as_accurate(got, truth[0, :, -inside:], low[0, :, -inside:])


def test_a_query_whose_lse_says_that_it_has_no_keys_adds_nothing():
    q, k = draw(20, 30)
    lse = lse_of(q.double(), k.double(), 0.2).float()
    others = torch.arange(20) != 7
    lse[..., 7] = float("-inf")
    mass = attention_mass(q, k, (0, 30), scale=0.2, lse=lse, backend="triton")
    truth = attention_mass_reference(q[:, others].double(), k.double(), (0, 30), 0.2) * 19 / 20
    assert_as_accurate(mass, truth, attention_mass_reference(q[:, others], k, (0, 30), 0.2) * (19 / 20))


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_query_stride_takes_every_nth_query(stride: int):
    q, k = draw(50, 40)
    expected = attention_mass(q[:, ::stride], k, (10, 40), backend="triton")
    assert torch.equal(attention_mass(q, k, (10, 40), query_stride=stride, backend="triton"), expected)
    lse = launch_lse(q, k, 32**-0.5, 1, SMALL)
    given = attention_mass(q, k, (10, 40), query_stride=stride, lse=lse, backend="triton")
    truth = attention_mass_reference(q[:, ::stride].double(), k.double(), (10, 40), 32**-0.5)
    assert_as_accurate(given, truth, attention_mass_reference(q[:, ::stride], k, (10, 40), 32**-0.5))


def test_the_op_is_the_reference():
    q, k = draw(40, 60, batch=2, C=64)
    truth = attention_mass_reference(q.double(), k.double(), (20, 60), 0.125)
    low = attention_mass_reference(q, k, (20, 60), 0.125)
    assert_as_accurate(attention_mass(q, k, (20, 60), backend="triton"), truth, low)
    reduced = attention_mass(q, k, (20, 60), reduce_heads=True, backend="triton")
    assert_as_accurate(reduced, truth.mean(1), low.mean(1))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    items=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    stride=st.integers(1, 3),
)
def test_ragged_items_equal_each_alone(items: list[tuple[int, int, int]], dtype: torch.dtype, stride: int):
    batch = RaggedBatch(items)
    q, k = draw(batch.rows, batch.keys, dtype=dtype)
    with Canaries():
        lse = launch_lse(q, k, 0.2, stride, SMALL, ragged=batch.ragged)
        mass = launch_mass(q, k, lse, 0.2, stride, SMALL, ragged=batch.ragged, total_ref=batch.refs)
    through_op = attention_mass_varlen(
        q[0], k[0], *batch.offsets, batch.starts, batch.refs, scale=0.2, query_stride=stride, backend="triton"
    )
    batch.check(mass, q, k, 0.2, stride)
    batch.check(through_op[None], q, k, 0.2, stride)


def test_rows_far_apart_need_int64_offsets():
    # 3 rows 2**30 elements apart: the last one's offset does not fit 32 bits. Virtual memory, hardly any of it touched.
    flat = torch.empty(2 * 2**30 + 64, dtype=torch.float16)
    far = flat.as_strided((1, 3, 1, 32), (2**31, 2**30, 32, 1))
    q, k = draw(3, 3, heads=1)
    far.copy_(k)
    truth = attention_mass_reference(q.double(), k.double(), (0, 3), 0.2)
    low = attention_mass_reference(q, k, (0, 3), 0.2)
    lse = launch_lse(q, far, 0.2, 1, SMALL)
    assert_as_accurate(launch_mass(q, far, lse, 0.2, 1, SMALL), truth, low)
    far.copy_(q)
    lse = launch_lse(far, k, 0.2, 1, SMALL)
    assert_as_accurate(launch_mass(far, k, lse, 0.2, 1, SMALL), truth, low)


def test_the_order_of_keys_does_not_matter_and_an_item_does_not_depend_on_its_neighbours():
    q, k = draw(20, 48, batch=2)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    mass = attention_mass(q, k, (0, 48), backend="triton")
    shuffled = attention_mass(q, in_nan(k[:, order], gap=16), (0, 48), backend="triton")
    torch.testing.assert_close(shuffled, mass[..., order], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 2), rtol=1e-5, atol=0)
    assert torch.equal(attention_mass(q[1:], k[1:], (0, 48), backend="triton"), mass[1:])


def test_what_the_kernels_cannot_do_is_refused_with_reasons():
    q, k = draw(4, 4)
    with pytest.raises(ConfigError, match=r"triton: needs a head dim in \(32, 64, 128\), got 24"):
        attention_mass(q[..., :24], k[..., :24], (0, 4), backend="triton")
    with pytest.raises(ConfigError, match="multiple of 16 bytes"):
        attention_mass(in_nan(q, gap=3), k, (0, 4), backend="triton")
    with pytest.raises(ConfigError, match="contiguous last dim"):
        attention_mass(q.transpose(2, 3).contiguous().transpose(2, 3), k, (0, 4), backend="triton")
    with pytest.raises(ConfigError, match="needs scale > 0"):
        attention_mass(q, k, (0, 4), scale=-1.0, backend="triton")

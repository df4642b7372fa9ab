"""The mass and LSE kernels of csrc, emulated, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ref_attn.functional import attention_mass, attention_mass_varlen
from sparse_ref_attn.kernels import abi
from sparse_ref_attn.ops.attention_mass.impl.cuda import launch_lse, launch_mass
from sparse_ref_attn.ops.attention_mass.reference import attention_mass_reference

from ..ops.guards import Canaries
from ..ops.mass_cases import RaggedBatch, draw, lse_of
from ..ops.tolerance import assert_as_accurate
from ..pairwise import pairwise
from .emulated import EARLY, LATE, MIXED, emulated, shipped

DTYPES = [torch.float16, torch.bfloat16]
SCHEDULES = [(1, EARLY), (2, LATE), (3, MIXED)]


@pairwise(C=[64, 128], dtype=DTYPES, schedule=SCHEDULES)
def test_several_tiles(C: int, dtype: torch.dtype, schedule: tuple[int, int]) -> None:
    q, k = draw(290, 270, C=C, dtype=dtype)
    scale, start = C**-0.5, 71  # the block of reference rows ends within a tile
    truth = lse_of(q.double(), k.double(), scale)
    with emulated(shipped(), *schedule) as library, Canaries():
        lse = launch_lse(q, k, scale, 1)
        assert library.count("bank conflict") == 0
        mass = launch_mass(q, k[:, start:], truth.float(), scale, 1)
        assert library.count("bank conflict") == 0
    assert_as_accurate(lse, truth, lse_of(q, k, scale), "lse")
    truth_mass = attention_mass_reference(q.double(), k.double(), (start, 270), scale)
    assert_as_accurate(mass, truth_mass, attention_mass_reference(q, k, (start, 270), scale), "mass")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "start"), [(1, 2, 1), (1, 63, 62), (63, 100, 0), (100, 16, 5), (129, 65, 64), (64, 128, 0)]
)
def test_odd_sizes(queries: int, keys: int, start: int, dtype: torch.dtype) -> None:
    q, k = draw(queries, keys, dtype=dtype, batch=2)
    with emulated(shipped()), Canaries():
        lse = launch_lse(q, k, 0.2, 1)
        mass = launch_mass(q, k[:, start:], lse, 0.2, 1)
    truth = attention_mass_reference(q.double(), k.double(), (start, keys), 0.2)
    assert_as_accurate(mass, truth, attention_mass_reference(q, k, (start, keys), 0.2))
    assert (mass.sum(-1) <= 1 + 1e-3).all()


def test_masked_keys_get_nothing_and_a_query_without_keys_stays_finite() -> None:
    q, k = draw(33, 170, batch=3)
    mask = torch.rand(3, 170, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[1] = False  # whole item without keys
    mask[2, :130] = False  # the first tiles hold no live key
    k = torch.where(mask[..., None, None], k, torch.full_like(k, 50.0))  # a masked key would win
    with emulated(shipped()), Canaries():
        lse = launch_lse(q, k, 0.2, 1, mask)
        mass = launch_mass(q, k[:, 30:], lse, 0.2, 1, mask[:, 30:])
    assert (lse[1] == float("-inf")).all()
    assert (mass[1] == 0).all()
    assert (mass.transpose(1, 2)[~mask[:, 30:]] == 0).all()
    for item in (0, 2):
        live = mask[item]
        kept, span = k[item, live][None], (0, int(live.sum()))
        truth = attention_mass_reference(q[item, None].double(), kept.double(), span, 0.2)
        low = attention_mass_reference(q[item, None], kept, span, 0.2)
        inside = int(live[30:].sum())
        assert_as_accurate(mass[item][:, live[30:]], truth[0, :, -inside:], low[0, :, -inside:])


def test_a_query_whose_lse_says_that_it_has_no_keys_adds_nothing() -> None:
    q, k = draw(20, 30)
    lse = lse_of(q.double(), k.double(), 0.2).float()
    others = torch.arange(20) != 7
    lse[..., 7] = float("-inf")
    with emulated(shipped()):
        mass = attention_mass(q, k, (0, 30), scale=0.2, lse=lse, backend="cuda")
    truth = attention_mass_reference(q[:, others].double(), k.double(), (0, 30), 0.2) * 19 / 20
    assert_as_accurate(mass, truth, attention_mass_reference(q[:, others], k, (0, 30), 0.2) * (19 / 20))


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_query_stride_takes_every_nth_query(stride: int) -> None:
    q, k = draw(250, 40)
    with emulated(shipped()):
        expected = attention_mass(q[:, ::stride], k, (10, 40), backend="cuda")
        assert torch.equal(attention_mass(q, k, (10, 40), query_stride=stride, backend="cuda"), expected)
        lse = launch_lse(q, k, 0.125, 1)
        given = attention_mass(q, k, (10, 40), query_stride=stride, lse=lse, backend="cuda")
    truth = attention_mass_reference(q[:, ::stride].double(), k.double(), (10, 40), 0.125)
    assert_as_accurate(given, truth, attention_mass_reference(q[:, ::stride], k, (10, 40), 0.125))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    items=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 140), st.integers(0, 140)), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    stride=st.integers(1, 3),
)
def test_ragged_items_equal_each_alone(items: list[tuple[int, int, int]], dtype: torch.dtype, stride: int) -> None:
    batch = RaggedBatch(items)
    q, k = draw(batch.rows, batch.keys, heads=1, dtype=dtype)
    with emulated(shipped(), seed=batch.rows), Canaries():
        lse = launch_lse(q, k, 0.2, stride, ragged=batch.ragged)
        mass = launch_mass(q, k, lse, 0.2, stride, ragged=batch.ragged, total_ref=batch.refs)
    with emulated(shipped()):
        through_op = attention_mass_varlen(
            q[0], k[0], *batch.offsets, batch.starts, batch.refs, scale=0.2, query_stride=stride, backend="cuda"
        )
    batch.check(mass, q, k, 0.2, stride)
    batch.check(through_op[None], q, k, 0.2, stride)


def test_rows_far_apart_need_int64_offsets() -> None:
    # 3 rows 2**30 elements apart: the last one's offset does not fit 32 bits. Virtual memory, hardly any of it touched.
    flat = torch.empty(2 * 2**30 + 64, dtype=torch.float16)
    far = flat.as_strided((1, 3, 1, 64), (2**31, 2**30, 64, 1))
    q, k = draw(3, 3, heads=1)
    truth = attention_mass_reference(q.double(), k.double(), (0, 3), 0.2)
    low = attention_mass_reference(q, k, (0, 3), 0.2)
    with emulated(shipped()):
        far.copy_(k)
        assert_as_accurate(launch_mass(q, far, launch_lse(q, far, 0.2, 1), 0.2, 1), truth, low)
        far.copy_(q)
        assert_as_accurate(launch_mass(far, k, launch_lse(far, k, 0.2, 1), 0.2, 1), truth, low)


def test_an_item_does_not_depend_on_its_neighbours_and_bits_repeat() -> None:
    q, k = draw(70, 48, batch=2)
    results = []
    for seed in range(4):
        with emulated(shipped(), seed, seed % 3):
            results.append(attention_mass(q, k, (0, 48), backend="cuda"))
            alone = attention_mass(q[1:], k[1:], (0, 48), backend="cuda")
    assert all(torch.equal(x, results[0]) for x in results)
    assert torch.equal(alone, results[0][1:])
    torch.testing.assert_close(results[0].sum(-1), torch.ones(2, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [64, 128])
def test_value_norms_and_the_mean_over_heads(C: int, dtype: torch.dtype) -> None:
    """What the C interface offers beyond the Python op, which does both in PyTorch."""
    q, k = draw(40, 60, heads=3, C=C, dtype=dtype, batch=2)
    value, _ = draw(60, 1, heads=3, C=C, dtype=dtype, batch=2)
    start, scale = 20, C**-0.5
    lse = lse_of(q.double(), k.double(), scale).float()
    with Canaries():
        mass, mean = torch.empty(2, 3, 40), torch.empty(2, 40)

    def scores(x: Tensor) -> abi.Tensor:
        return abi.Tensor(x.data_ptr(), x.stride(0), x.stride(-1), x.stride(1) if x.ndim == 3 else 0)

    k_ref, v_ref = k[:, start:], value[:, start:]
    arguments = abi.AttentionMassArgs(
        dtype=DTYPES.index(dtype), channels=C, heads=3, items=2, queries=40, refs=40, query_stride=1, scale=scale,
        q=abi.Tensor(q.data_ptr(), *q.stride()[:3]),
        k=abi.Tensor(k_ref.data_ptr(), *k.stride()[:3]),
        value=abi.Tensor(v_ref.data_ptr(), *value.stride()[:3]),
        lse=scores(lse), mass=scores(mass), mean=scores(mean),
    )  # fmt: skip
    library = shipped()
    library.announced.clear()
    for x in (q, k_ref, v_ref, lse, mass, mean):
        library.announce(x)
    library.call("sra_attention_mass", arguments, 0)
    norms = v_ref.double().norm(dim=-1).transpose(1, 2)
    truth = attention_mass_reference(q.double(), k.double(), (start, 60), scale) * norms
    low = attention_mass_reference(q, k, (start, 60), scale) * norms.to(dtype)
    assert_as_accurate(mass, truth, low, "mass")
    assert_as_accurate(mean, truth.mean(1), low.mean(1), "mean")

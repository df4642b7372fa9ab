"""The mass, LSE and row kernels on a card: float64 truth, the same bits every time, far rows, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.errors import LayoutError
from sparse_ref_attn.functional import attention_mass, attention_mass_varlen, pack_rows, unpack_rows
from sparse_ref_attn.ops import verdicts
from sparse_ref_attn.ops.attention_mass.reference import attention_mass_reference

from ..ops.guards import in_nan
from ..ops.tolerance import assert_as_accurate
from .kernels import OWN, require

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FAR_BYTES = 2**32 + 2**20


def draw(queries: int, keys: int, heads: int = 3, C: int = 64, dtype: torch.dtype = torch.bfloat16, batch: int = 2):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    q, k = (2 * torch.randn(batch, n, heads, C, generator=generator) for n in (queries, keys))
    return in_nan(q.to(DEVICE, dtype), gap=16), in_nan(k.to(DEVICE, dtype), gap=16)


def check(mass: Tensor, q: Tensor, k: Tensor, span: tuple[int, int], mask: Tensor | None = None) -> None:
    scale = q.shape[-1] ** -0.5
    truth = attention_mass_reference(q.double(), k.double(), span, scale, mask)
    assert_as_accurate(mass, truth, attention_mass_reference(q, k, span, scale, mask))


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C", [32, 64, 128])
@pytest.mark.parametrize(
    ("queries", "keys", "start"), [(1, 63, 62), (63, 100, 0), (129, 65, 64), (512, 1300, 700), (1000, 129, 5)]
)
def test_mass(queries: int, keys: int, start: int, C: int, dtype: torch.dtype, backend: str):
    require(backend, C)
    q, k = draw(queries, keys, C=C, dtype=dtype)
    check(attention_mass(q, k, (start, keys), backend=backend), q, k, (start, keys))
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[:, -1] = True
    mask = mask.to(DEVICE)
    check(attention_mass(q, k, (start, keys), key_mask=mask, backend=backend), q, k, (start, keys), mask)
    strided = attention_mass(q, k, (start, keys), query_stride=3, backend=backend)
    check(strided, q[:, ::3], k, (start, keys))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C", [32, 64, 128])
@pytest.mark.parametrize("sizes", [[16] * 32, [64] * 8, [1, 0, 300, 16, 5, 0, 190], [512], [1] * 512])
def test_mass_per_tile(sizes: list[int], C: int, dtype: torch.dtype):
    """Every card's configuration cuts these tiles otherwise."""
    require("triton", C)
    q, k = draw(512, 700, C=C, dtype=dtype)
    span, cut = (130, 700), [0, *torch.tensor(sizes).cumsum(0).tolist()]
    mask = (torch.arange(700) % 7 != 3).expand(2, -1).to(DEVICE)
    lse = (torch.einsum("bnhc,bshc->bhns", q.double(), k.double()) * C**-0.5).logsumexp(-1).float()
    for integer, kept, given in ((torch.int32, None, lse), (torch.int64, mask, None)):
        tiles = torch.tensor(cut, dtype=integer, device=DEVICE)
        truth = attention_mass_reference(q.double(), k.double(), span, C**-0.5, kept, tiles=cut)
        low = attention_mass_reference(q, k, span, C**-0.5, kept, tiles=cut)
        arguments = {"tiles": tiles, "key_mask": kept, "lse": given, "backend": "triton"}
        mass = attention_mass(q, k, span, **arguments)
        assert_as_accurate(mass, truth, low)
        reduced = attention_mass(q, k, span, reduce_heads=True, **arguments)
        assert_as_accurate(reduced, truth.mean(1), low.mean(1))
        assert torch.equal(attention_mass(q, k, span, reduce_heads=True, **arguments), reduced)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("stride", [1, 4])
def test_ragged(stride: int, backend: str):
    require(backend)
    items = [(300, 400, 77), (0, 5, 3), (64, 128, 128), (1, 63, 0), (129, 100, 1)]  # queries, keys, references
    counts = torch.tensor(items)
    offsets = torch.cat([torch.zeros(1, 3, dtype=torch.long), counts.cumsum(0)]).t().to(torch.int32).contiguous()
    starts = (offsets[1, 1:] - counts[:, 2]).to(torch.int32)
    rows, keys, refs = offsets[:, -1].tolist()
    q, k = draw(rows, keys, batch=1)
    mass = attention_mass_varlen(
        q[0], k[0], *offsets.to(DEVICE), starts.to(DEVICE), refs, query_stride=stride, backend=backend
    )
    for item, (n, s, r) in enumerate(items):
        at = offsets[:, item].tolist()
        mine = mass[None, :, at[2] : at[2] + r]
        if n and r:
            check(mine, q[:, at[0] : at[0] + n : stride], k[:, at[1] : at[1] + s], (s - r, s))
        else:
            assert not mine.any()


@pytest.mark.parametrize("backend", OWN)
def test_checking_mode_names_bad_offsets(backend: str):
    require(backend)
    q, k = draw(40, 70, batch=1)
    cu_q, cu_k, cu_ref = (torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (40, 70, 30))
    starts = torch.tensor([41], dtype=torch.int32, device=DEVICE)
    with pytest.raises(LayoutError, match=r"must lie among its keys, rows 0 to 70 of k, got rows 41 to 71"):
        attention_mass_varlen(q[0], k[0], cu_q, cu_k, cu_ref, starts, 30, backend=backend, check=True)


@pytest.mark.parametrize("backend", OWN)
def test_mass_has_the_same_bits_every_time(backend: str):
    require(backend)
    q, k = draw(1000, 2000, heads=24, C=128, batch=1)
    first = attention_mass(q, k, (700, 2000), backend=backend)
    for _ in range(10):
        assert torch.equal(attention_mass(q, k, (700, 2000), backend=backend), first)


def need_memory(needed: int) -> None:
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free device memory")


@pytest.mark.parametrize("backend", OWN)
def test_mass_of_rows_that_need_int64_offsets(backend: str):
    require(backend)
    need_memory(FAR_BYTES)
    flat = torch.empty(FAR_BYTES // 2, dtype=torch.float16, device=DEVICE)
    far = flat.as_strided((1, 3, 1, 32), (2**31, 2**30, 32, 1))
    q, k = draw(3, 3, heads=1, C=32, dtype=torch.float16, batch=1)
    far.copy_(k)
    check(attention_mass(q, far, (0, 3), backend=backend), q, k, (0, 3))
    far.copy_(q)
    check(attention_mass(far, k, (0, 3), backend=backend), q, k, (0, 3))


@pytest.mark.parametrize("backend", OWN)
def test_mass_and_rows_in_a_cuda_graph(backend: str):
    require(backend)
    if not torch.cuda.is_available():
        pytest.skip("graphs belong to the card")
    q, k = draw(100, 200, C=128)
    rows, tiles = torch.arange(0, 200, 3, device=DEVICE), torch.tensor([0, 16, 90, 100], device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        kept = pack_rows(k, rows, backend=backend)
        mass = attention_mass(q, k, (50, 200), backend=backend)
        per_tile = attention_mass(q, k, (50, 200), tiles=tiles, reduce_heads=True, backend="triton")
        return mass, per_tile, unpack_rows(kept, rows, 200, backend=backend)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    q.mul_(0.5)
    k.mul_(-1)
    graph.replay()
    for one, expected in zip(captured, step(), strict=True):
        assert torch.equal(one, expected)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "kept", "inner"), [(1, 1, 1), (63, 0, 5), (129, 100, 63), (500, 129, 3072)])
def test_rows(size: int, kept: int, inner: int, dtype: torch.dtype, backend: str):
    require(backend)
    generator = torch.Generator().manual_seed(size)
    rows = torch.randperm(size, generator=generator)[:kept].to(DEVICE)
    x = [torch.randn(shape, generator=generator) for shape in ((2, size, inner), (1, size, 3, 2), (4, size))]
    x = [(3 * t).to(DEVICE, dtype) for t in x]
    packed = pack_rows(x, rows, backend=backend)
    back = unpack_rows(packed, rows, size, backend=backend)
    for full, some, again in zip(x, packed, back, strict=True):
        assert torch.equal(some, full.index_select(1, rows))
        assert torch.equal(again, torch.zeros_like(full).index_copy(1, rows, some))


@pytest.mark.parametrize("backend", OWN)
def test_gradients_of_rows(backend: str):
    require(backend)
    x = torch.randn(2, 129, 40, device=DEVICE, requires_grad=True)
    rows = torch.randperm(129, generator=torch.Generator().manual_seed(0))[:50].to(DEVICE)
    weight = torch.randn(2, 50, 40, device=DEVICE)
    (grad,) = torch.autograd.grad((pack_rows(x, rows, backend=backend) * weight).sum(), x)
    assert torch.equal(grad, torch.zeros_like(x).index_copy(1, rows, weight))


@pytest.mark.parametrize("backend", OWN)
def test_rows_that_need_int64_offsets(backend: str):
    require(backend)
    need_memory(FAR_BYTES)
    far = torch.empty(FAR_BYTES // 2, dtype=torch.float16, device=DEVICE).as_strided((1, 3, 32), (0, 2**30, 1))
    far.copy_(torch.randn(1, 3, 32))
    rows = torch.tensor([2, 0], device=DEVICE)
    assert torch.equal(pack_rows(far, rows, backend=backend), far[:, [2, 0]])


def test_auto_takes_what_was_proved_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verdicts.forget()
    q, k = draw(33, 65)
    got = attention_mass(q, k, (0, 65))
    (verdict,) = verdicts.store.known().values()
    assert {"triton", "chunked"} <= set(verdict.order)
    assert torch.equal(got, attention_mass(q, k, (0, 65), backend=verdict.order[0]))
    verdicts.forget()


def test_checking_mode_names_a_bad_row():
    x, rows = torch.randn(1, 6, 3, device=DEVICE), torch.tensor([2, 6], device=DEVICE)
    for backend in ("reference", "triton"):
        with pytest.raises(LayoutError, match=r"rows must lie in \[0, 6\), got values from 2 to 6"):
            pack_rows(x, rows, backend=backend, check=True)
        with pytest.raises(LayoutError, match=r"rows must lie in \[0, 6\)"):
            unpack_rows(x[:, :2], rows, 6, backend=backend, check=True)

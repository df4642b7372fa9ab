"""attention_mass per tile of queries, against the softmax in float64."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.functional import attention_mass
from sparse_ref_attn.ops import verdicts
from sparse_ref_attn.ops.attention_mass.backends import keys_read
from sparse_ref_attn.ops.attention_mass.impl import chunked
from sparse_ref_attn.ops.attention_mass.impl.tiling import chunks_of
from sparse_ref_attn.ops.attention_mass.masked import attention_mass_masked
from sparse_ref_attn.ops.attention_mass.registered import mass_tiles_op
from sparse_ref_attn.ops.attention_mass.trial import kind_of
from tests import stand_in_backend
from tests.device_reads import device_reads

from .rounding import assert_rounded, of_mass

BACKENDS = ["auto", "reference", "chunked"]
TILINGS = {
    "equal": [0, 16, 32, 48, 64],
    "ragged, as at the edge of a grid": [0, 16, 32, 40, 56, 60, 61, 62, 63, 64],
    "one": [0, 64],
    "empty ones": [0, 0, 16, 16, 32, 32, 32, 64, 64],
    "each query": list(range(65)),
    "long ones": [0, 1, 50, 64],
}
SPAN = (37, 100)


def draw(queries: int = 64, keys: int = 100, heads: int = 3, C: int = 16, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    return tuple(torch.randn(batch, n, heads, C, generator=generator) for n in (queries, keys))


def mask_of(keys: int = 100, batch: int = 2) -> Tensor:
    return torch.rand(batch, keys, generator=torch.Generator().manual_seed(5)) > 0.3


def truth(q: Tensor, k: Tensor, tiles: list[int], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean (B, H, T, R) over each tile's rows of the softmax, and the LSE (B, H, N), in float64."""
    scores = torch.einsum("bnhc,bshc->bhns", q.double(), k.double()) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., slice(*SPAN)]
    means = [weights[:, :, a:b].sum(2) / max(b - a, 1) for a, b in pairwise(tiles)]
    return torch.stack(means, 2), scores.logsumexp(-1)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TILINGS)
def test_each_tile_has_the_mean_of_its_own_queries(name: str, backend: str, given: bool) -> None:
    q, k = draw()
    tiles = TILINGS[name]
    for mask in (None, mask_of()):
        expected, lse = truth(q, k, tiles, mask)
        arguments = {
            "tiles": torch.tensor(tiles),
            "key_mask": mask,
            "lse": lse.float() if given else None,
            "backend": backend,
        }
        mass = attention_mass(q, k, SPAN, **arguments)
        assert (mass.dtype, mass.shape) == (torch.float32, expected.shape)
        torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-8)
        reduced = attention_mass(q, k, SPAN, reduce_heads=True, **arguments)
        torch.testing.assert_close(reduced.double(), expected.mean(1), rtol=1e-5, atol=1e-8)
        if mask is not None:
            assert (mass.transpose(1, 3)[~mask[:, slice(*SPAN)]] == 0).all()


def test_roundings_are_those_of_float32() -> None:
    q, k = draw()
    for first, last in pairwise(TILINGS["long ones"]):
        tiles = torch.tensor(sorted({0, first, last, 64}))
        at = int((tiles == first).nonzero())
        exact, deviation = truth(q, k, [first, last])[0][:, :, 0], of_mass(q[:, first:last], k, SPAN, 0.25)[0]
        for backend in BACKENDS:
            mass = attention_mass(q, k, SPAN, tiles=tiles, backend=backend)[:, :, at]
            assert_rounded(mass, exact, deviation, backend)


@pytest.mark.parametrize("name", TILINGS)
def test_the_tiles_together_are_the_pooled_mass(name: str) -> None:
    q, k = draw()
    tiles = torch.tensor(TILINGS[name], dtype=torch.int32)
    mass = attention_mass(q, k, SPAN, tiles=tiles)
    pooled = (mass * tiles.diff().view(1, 1, -1, 1)).sum(2) / 64
    torch.testing.assert_close(pooled, attention_mass(q, k, SPAN), rtol=1e-5, atol=1e-8)
    if name == "one":
        assert torch.equal(mass[:, :, 0], attention_mass(q, k, SPAN))


@pytest.mark.parametrize("rows", [1, 7, 16, 48])
@pytest.mark.parametrize("name", TILINGS)
@pytest.mark.parametrize("reduce_heads", [False, True])
def test_the_size_of_a_chunk_changes_nothing(
    name: str, rows: int, reduce_heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = draw()
    expected, lse = truth(q, k, TILINGS[name])
    expected = expected.mean(1) if reduce_heads else expected
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", rows * 4 * (SPAN[1] - SPAN[0]))
    for pivot in (None, lse.float()):
        mass = attention_mass(q, k, SPAN, tiles=torch.tensor(TILINGS[name]), reduce_heads=reduce_heads, lse=pivot)
        torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("most", [1, 5, 16, 1000])
@pytest.mark.parametrize("name", TILINGS)
def test_chunks_take_every_row_once_and_whole_tiles_where_they_fit(name: str, most: int) -> None:
    tiles, seen, end = TILINGS[name], [], 0
    for rows, runs in chunks_of(tiles, most):
        assert rows.start == end
        assert 0 < rows.stop - rows.start <= most
        end, first = rows.stop, 0
        for run in runs:
            assert run.first == first
            first += run.number * run.size
            seen += [(run.tile + i, run.size) for i in range(run.number)]
        assert first == rows.stop - rows.start
    assert end == 64
    for tile, size in enumerate(b - a for a, b in pairwise(tiles)):
        parts = [rows for at, rows in seen if at == tile]
        assert sum(parts) == size
        assert len(parts) == -(-size // most)


def test_values_weigh_before_heads_are_reduced() -> None:
    q, k = draw()
    v = torch.randn(2, 100, 3, 8, generator=torch.Generator().manual_seed(3))
    tiles = TILINGS["ragged, as at the edge of a grid"]
    norms = v[:, slice(*SPAN)].double().norm(dim=-1).transpose(1, 2)
    expected = truth(q, k, tiles)[0] * norms[:, :, None]
    for reduced, wanted in ((False, expected), (True, expected.mean(1))):
        mass = attention_mass(q, k, SPAN, tiles=torch.tensor(tiles), value=v, reduce_heads=reduced)
        torch.testing.assert_close(mass.double(), wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_give_nothing(backend: str, given: bool) -> None:
    q, k = draw()
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[0] = False
    expected, lse = truth(q, k, TILINGS["equal"], mask)
    pivot = lse.float() if given else None
    tiles = torch.tensor(TILINGS["equal"])
    mass = attention_mass(q, k, SPAN, key_mask=mask, lse=pivot, tiles=tiles, backend=backend)
    assert (mass[0] == 0).all()
    torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_items_or_heads_give_zeros(backend: str) -> None:
    for batch, queries, heads in ((2, 0, 3), (0, 4, 3), (2, 4, 0)):
        q, k = torch.randn(batch, queries, heads, 16), torch.randn(batch, 100, heads, 16)
        tiles = torch.tensor([0, queries, queries])
        assert torch.equal(
            attention_mass(q, k, SPAN, tiles=tiles, backend=backend), torch.zeros(batch, heads, 2, SPAN[1] - SPAN[0])
        )
    q, k = draw(queries=0)
    assert attention_mass(q, k, SPAN, tiles=torch.tensor([0]), reduce_heads=True, backend=backend).shape == (2, 0, 63)


def test_expanded_key_heads_and_strided_queries() -> None:
    """Grouped heads as a view, and the query rows of one joint tensor."""
    q, k = draw(heads=4)
    joint = torch.cat([torch.full((2, 5, 4, 16), torch.nan), q], 1)[:, 5:]
    shared = k[:, :, :2, None].expand(2, 100, 2, 2, 16).flatten(2, 3)
    tiles = TILINGS["ragged, as at the edge of a grid"]
    for backend in BACKENDS:
        mass = attention_mass(joint, shared, SPAN, tiles=torch.tensor(tiles), backend=backend)
        torch.testing.assert_close(mass.double(), truth(q, shared, tiles)[0], rtol=1e-5, atol=1e-8)


def test_any_mask_of_scores() -> None:
    """In one piece and in many; a bool mask for each query, a bias for each head."""
    q, k = draw()
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(2, 1, 64, 100, generator=generator) > 0.3, torch.randn(1, 3, 1, 100, generator=generator)]
    masks[0][:, :, 5] = False
    for mask in masks:
        dense = torch.einsum("bnhc,bshc->bhns", q.double(), k.double()) / 4
        dense = dense.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else dense + mask.double()
        weights = dense.softmax(-1).nan_to_num(0.0)[..., slice(*SPAN)]
        for tiles in TILINGS.values():
            wanted = torch.stack([weights[:, :, a:b].sum(2) / max(b - a, 1) for a, b in pairwise(tiles)], 2)
            for pieces in (1 << 24, 3000):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("sparse_ref_attn.ops.attention_mass.masked._BUDGET", pieces)
                    got = attention_mass_masked(q.double(), k.double(), SPAN, mask, tiles=tiles)
                    reduced = attention_mass_masked(q.double(), k.double(), SPAN, mask, tiles=tiles, reduce_heads=True)
                torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-15)
                torch.testing.assert_close(reduced, wanted.mean(1), rtol=1e-13, atol=1e-15)
    with pytest.raises(LayoutError, match="query_stride must be 1 with tiles"):
        attention_mass_masked(q, k, SPAN, masks[1], 2, tiles=[0, 64])
    with pytest.raises(LayoutError, match="tiles must run from 0 to 64"):
        attention_mass_masked(q, k, SPAN, masks[1], tiles=[0, 60])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_read_where_the_host_knows_the_tiles(backend: str) -> None:
    q, k = draw()
    tiles = TILINGS["ragged, as at the edge of a grid"]
    want = attention_mass(q, k, SPAN, tiles=torch.tensor(tiles), backend=backend)
    with device_reads() as reads:
        got = attention_mass(q, k, SPAN, tiles=torch.tensor(tiles), host=tiles, backend=backend)
    assert [read for read in reads if "_add" not in read] == []
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tiles": [1, 64]}, r"tiles must run from 0 to 64 without decreasing, got \[1, 64\]"),
        ({"tiles": [0, 63]}, "tiles must run from 0 to 64"),
        ({"tiles": [0, 40, 30, 64]}, "tiles must run from 0 to 64"),
        ({"tiles": []}, r"tiles must be \(T \+ 1,\) int32 or int64"),
        ({"tiles": [[0, 64]]}, r"tiles must be \(T \+ 1,\) int32 or int64"),
        ({"tiles": [0.0, 64.0]}, r"tiles must be .* got \(2,\), torch.float32"),
        (
            {"tiles": [0, 64], "query_stride": 2},
            "query_stride must be 1 with tiles, of which every query counts, got 2",
        ),
        ({"tiles": [0, 64], "host": [0, 32, 64]}, "host must hold the 2 numbers of tiles, got 3"),
        ({"tiles": [0, 64], "host": [0, 63]}, r"tiles must run from 0 to 64 without decreasing, got \[0, 63\]"),
        ({"host": [0, 64]}, "host must be what tiles holds, got no tiles"),
    ],
)
def test_bad_input_is_refused_in_words(change: dict[str, object], words: str) -> None:
    q, k = draw()
    if "tiles" in change:
        change = change | {"tiles": torch.tensor(change["tiles"])}
    with pytest.raises(LayoutError, match=words):
        attention_mass(q, k, SPAN, **change)


def test_a_backend_that_cannot_says_so() -> None:
    q, k = draw()
    with pytest.raises(ConfigError, match=r"cuda: .*cannot give each tile a mass of its own"):
        attention_mass(q, k, SPAN, tiles=torch.tensor([0, 64]), backend="cuda")


def test_opcheck() -> None:
    q, k = draw()
    tiles = TILINGS["ragged, as at the edge of a grid"]
    lse = truth(q, k, tiles)[1].float()
    offsets = torch.tensor(tiles, dtype=torch.int32)
    for mask, pivot, host, reduced in ((None, None, None, True), (mask_of(), lse, tiles, False)):
        torch.library.opcheck(mass_tiles_op, (q, k, *SPAN, 0.25, mask, pivot, offsets, host, reduced, "chunked"))


def test_compiles_whole_and_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attention_mass, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, keys, cut in (
        (64, 100, [0, 7, 16, 64]),
        (80, 110, [0, 16, 32, 48, 80]),
        (96, 120, [0, 0, 16, 32, 64, 96]),
    ):
        q, k = draw(rows, keys)
        span, tiles = (keys // 3, keys), torch.tensor(cut)
        got = compiled(q, k, span, tiles=tiles, reduce_heads=True)
        assert torch.equal(got, attention_mass(q, k, span, tiles=tiles, reduce_heads=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_verdicts_of_tiles_are_their_own() -> None:
    q, k = draw(C=32)
    kinds = {kind_of(q, k, 63, given, tiled) for given in (False, True) for tiled in (False, True)}
    assert len(kinds) == 4
    kind = kind_of(q, k, 63, True, tiled=True)
    assert kind.form == "LSE given, per tile"
    verdict = verdicts.dispatch.verdict_of(kind)
    assert set(verdict.order) == {"chunked", "reference"}
    assert not verdict.unusable


def test_the_work_of_tiles_goes_by_their_own_verdict(tmp_path: Path) -> None:
    q, k = draw()
    with stand_in_backend.judged(tmp_path):
        for tiled, form in ((False, "LSE computed"), (True, "LSE computed, per tile")):
            assert keys_read(q, k, 63, tiled) == 100
            assert form in {kind.form for kind in verdicts.store.known()}
        assert len(verdicts.store.known()) == 2


@pytest.mark.parametrize("wrong", [False, True])
def test_auto_takes_what_its_verdict_says(wrong: bool, tmp_path: Path) -> None:
    """A backend whose masses per tile are off is not taken for tiles, whatever it makes of the pooled mass."""
    q, k = draw()
    tiles = torch.tensor(TILINGS["equal"])
    with stand_in_backend.judged(tmp_path, ("stand_in",)):
        if wrong:
            stand_in_backend.spoiled["tile_mass"] = lambda mass: mass * 1.01
            with pytest.raises(ConfigError, match="none that agrees with the definition"):
                attention_mass(q, k, SPAN, tiles=tiles)
        else:
            attention_mass(q, k, SPAN, tiles=tiles)
            assert [name for name, _ in stand_in_backend.calls][-2:] == ["lse", "tile_mass"]
        stand_in_backend.calls.clear()
        attention_mass(q, k, SPAN)
        assert stand_in_backend.calls[-1][0] == "mass"

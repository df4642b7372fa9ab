"""Saved rankings: round trip, damage, comparison, use as a selector."""

from __future__ import annotations

import math
import zipfile

import numpy as np
import pytest
import torch

from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.selection import Ranking, SavedRanking, fingerprint

from .scenes import references


def ranking(seed=0, grids=((3, 5), None, (1, 1)), sizes=(15, 7, 1), digest="ab"):
    generator = torch.Generator().manual_seed(seed)
    return Ranking([torch.rand(n, generator=generator) for n in sizes], grids, "FluxTransformer2DModel", digest)


def test_round_trip(tmp_path):
    path = tmp_path / "kept.ranking"
    saved = ranking()
    saved.save(path)
    loaded = Ranking.load(str(path))
    assert (loaded.sizes, loaded.grids, loaded.model, loaded.fingerprint) == (
        (15, 7, 1),
        ((3, 5), None, (1, 1)),
        "FluxTransformer2DModel",
        "ab",
    )
    assert all(torch.equal(a, b) for a, b in zip(saved.scores, loaded.scores, strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["kept.ranking"]


def test_saving_replaces_and_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.npz"
    ranking(0).save(path)
    ranking(1).save(path)
    assert torch.equal(Ranking.load(path).scores[0], ranking(1).scores[0])
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(ConfigError, match="folder must fit into"):
        ranking().save(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "r.npz"]


def write(path, content):
    path.write_bytes(content)
    return path


def test_missing_foreign_and_damaged_files(tmp_path):
    good = tmp_path / "good"
    ranking().save(good)
    content = good.read_bytes()
    np.savez(tmp_path / "foreign.npz", weights=np.ones(3))
    np.savez(tmp_path / "pickle.npz", about=np.array({"format": 1}, dtype=object))
    np.savez(tmp_path / "other.npz", about=np.array('{"format": "2"}'))
    np.savez(tmp_path / "list.npz", about=np.array("[1]"))
    np.save(tmp_path / "array.npy", np.ones(3))
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 0xFF
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    paths = [
        tmp_path / "nothing",
        tmp_path,
        write(tmp_path / "empty", b""),
        write(tmp_path / "text", b"not a ranking"),
        write(tmp_path / "cut", content[: len(content) // 2]),
        write(tmp_path / "head", content[-200:]),
        write(tmp_path / "flipped", bytes(flipped)),
        *(tmp_path / name for name in ("foreign.npz", "pickle.npz", "other.npz", "list.npz", "array.npy", "empty.npz")),
    ]
    for path in paths:
        with pytest.raises(ConfigError, match="must be a file"):
            Ranking.load(path)


def test_any_cut_or_flipped_byte_is_an_error_or_harmless(tmp_path):
    path, damaged = tmp_path / "good", tmp_path / "bad"
    saved = ranking()
    saved.save(path)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[at] ^= 0x41
        for broken in (bytes(flipped), content[:at]):
            write(damaged, broken)
            try:
                loaded = Ranking.load(damaged)
            except (ConfigError, LayoutError):
                continue
            assert all(torch.equal(a, b) for a, b in zip(saved.scores, loaded.scores, strict=True))


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    a = Ranking([torch.randint(0, 6, (50,)).float(), torch.rand(9)], [(5, 10), None], "M", "")
    b = Ranking([torch.randint(0, 6, (50,)).float(), torch.rand(9)], [(5, 10), None], "M", "")
    truth = [stats.spearmanr(x.numpy(), y.numpy()).statistic for x, y in zip(a.scores, b.scores, strict=True)]
    assert a.spearman(b) == pytest.approx(truth, abs=1e-12)
    assert a.spearman(a) == pytest.approx([1.0, 1.0])


def test_spearman_of_constant_and_single_scores_is_nan():
    flat = Ranking([torch.zeros(4), torch.ones(1)], [(2, 2), (1, 1)], "M", "")
    assert all(math.isnan(r) for r in flat.spearman(flat))
    with pytest.raises(LayoutError, match="same sizes"):
        flat.spearman(ranking())


def test_scores_as_saved_for_the_same_reference():
    refs = references([(3, 5), (1, 1)], batch=2)
    kept = ranking(grids=((3, 5), (1, 1)), sizes=(15, 1), digest=fingerprint(refs.tokens))
    scores = SavedRanking(kept).score(refs)
    assert all(torch.equal(a, b) for a, b in zip(scores, kept.scores, strict=True))
    scores[0].zero_()
    assert kept.scores[0].any()


def test_refuses_another_reference_unless_told():
    refs = references([(3, 5)])
    kept = ranking(grids=((3, 5),), sizes=(15,), digest=fingerprint(refs.tokens + 1))
    with pytest.raises(LayoutError, match="require_same_reference"):
        SavedRanking(kept).score(refs)
    assert torch.equal(SavedRanking(kept, require_same_reference=False).score(refs)[0], kept.scores[0])


@pytest.mark.parametrize("grids", [[(5, 3)], [(3, 4)], [(3, 5), (1, 1)]])
def test_refuses_other_grids(grids):
    kept = ranking(grids=((3, 5),), sizes=(15,))
    with pytest.raises(LayoutError, match="must fit"):
        SavedRanking(kept, require_same_reference=False).score(references(grids))


def test_rankings_must_be_whole():
    for scores, grids in [([], []), ([torch.ones(4)], []), ([torch.ones(4)], [(3, 1)]), ([torch.ones(2, 2)], [None])]:
        with pytest.raises(LayoutError, match="must have"):
            Ranking(scores, grids, "M", "")
    with pytest.raises(ConfigError, match="must be a Ranking"):
        SavedRanking("kept.npz")
    with pytest.raises(ConfigError, match="require_same_reference must be True or False, got 'no'"):
        SavedRanking(Ranking([torch.ones(4)], [None], "M", ""), "no")

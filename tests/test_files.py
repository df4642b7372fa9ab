"""What is written is whole or absent, and a disk without room is told in words."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

import sparse_ref_attn as sra
from sparse_ref_attn.cli import main
from sparse_ref_attn.errors import ConfigError, LayoutError
from sparse_ref_attn.eval.rows import KEY, RowStore
from sparse_ref_attn.files import fits, replacing
from sparse_ref_attn.reference_cache.saved import Source
from sparse_ref_attn.selection import Ranking


@contextmanager
def room(size: int) -> Iterator[None]:
    """Inside, no file of this process can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def cache() -> sra.ReferenceCache:
    k, v = torch.rand(2, 1, 64, 4, 16)  # in one memory
    return sra.ReferenceCache([(k, v), (k, k)], torch.arange(64), Source("m", "w", "", "r", (64,), ((8, 8),)))


def save_rows(path: Path) -> None:
    store = RowStore(path.parent, ["x"])
    store.append(0, [dict.fromkeys(KEY, i) | {"x": 0.5} for i in range(500)])
    store.merge()


WRITERS = {
    "ranking": lambda path: Ranking([torch.rand(4096)], [(64, 64)], "m", "ab").save(path),
    "cache": lambda path: cache().save(path),
    "rows": save_rows,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_without_room_nothing_is_left_but_what_was_there(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("before")
    with room(2000), pytest.raises(ConfigError, match=r"must fit into .*File too large"):
        write(path)
    assert path.read_text() == "before"
    assert {each.name for each in tmp_path.iterdir()} <= {"rows.csv", "rows.part-0.csv"}


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cup must fit into .*nowhere, got: .*No such file"):
        WRITERS["ranking"](tmp_path / "nowhere" / "cup")


def test_a_cache_whose_layers_share_memory(tmp_path: Path) -> None:
    cache().save(tmp_path / "a")
    found, kept = sra.ReferenceCache.load(tmp_path / "a"), cache()
    assert [[x.shape for x in pair] for pair in found.layers] == [[x.shape for x in pair] for pair in kept.layers]
    assert torch.equal(found.layers[0][0], found.layers[1][1])
    assert not torch.equal(found.layers[0][0], found.layers[0][1])


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with replacing(tmp_path / "a") as draft:
            Path(draft).write_text("b")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_errors_that_are_no_lack_of_room_stay_what_they_are() -> None:
    for error in (LayoutError("of ours"), sra.IncompatibleError("a RuntimeError too"), KeyError("foreign")):
        with pytest.raises(type(error)) as raised, fits("a", "b"):
            raise error
        assert raised.value is error


def test_a_command_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cup.png")
    call = ["demo", "--size", "tiny", "--image", str(tmp_path / "cup.png"), "--out", str(tmp_path / "out")]
    with room(200):
        assert main(call) == 2
    told = capsys.readouterr().err
    assert f"sra: error: dense.png must fit into {tmp_path / 'out'}, got: " in told
    assert os.strerror(errno.EFBIG) in told

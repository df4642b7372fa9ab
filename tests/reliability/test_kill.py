"""SIGKILL at random moments: what was being written is whole, old or absent, and a training run ends as if unkilled.

The process that is killed is a fork of this one, so that a kill costs no new start of Python.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.reference_cache.saved import Source
from sparse_ref_attn.selection import Ranking
from sparse_ref_attn.training import RandomDrop, checkpoint, patch_for_training
from sparse_ref_attn.training.loop import TrainConfig, train
from tests.training.test_loop import Pipe, batches, same

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks"),
    pytest.mark.skipif(torch.cuda.is_initialized(), reason="a fork cannot use CUDA after its parent did"),
]
STEPS = 12
SETTINGS = {"warmup": 2, "decay": 2, "checkpoint_every": 1, "precision": "no"}


def forked(work: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def kill(process: multiprocessing.process.BaseProcess, after: float) -> bool:
    """Whether it was still running when it was killed, `after` seconds from now."""
    process.join(after)
    alive = process.is_alive()
    if alive:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert alive or process.exitcode == 0
    return alive


def run(out: Path, seed: int = 0) -> None:
    pipe = Pipe(0 if checkpoint.latest(out) is None else seed)  # all of it must come from the checkpoint
    drop = patch_for_training(pipe.transformer, RandomDrop((0.2, 0.9)))
    train(pipe, batches, TrainConfig(steps=STEPS, **SETTINGS), out, drop=drop)


def killed_training(folder: Path, kills: int, random: Random) -> int:
    """How often a run was killed before it came to its end, which must be that of a run that nobody killed."""
    began = time.monotonic()
    assert not kill(forked(run, folder / "whole"), 3600)
    whole, done = time.monotonic() - began, 0
    for attempt in range(kills + 1):
        last = attempt == kills
        alive = kill(forked(run, folder / "killed", attempt), 3600 if last else random.uniform(0, whole / 2))
        found = checkpoint.latest(folder / "killed")
        if found is not None:
            weights = {name: p.detach() for name, p in Pipe().transformer.named_parameters()}
            _, about = checkpoint.load(found, weights, {name: p.clone() for name, p in weights.items()})
            assert f"step-{about['step']:06d}" == found.name
        if not alive and not done and not last:  # the machine was busier when nobody killed
            shutil.rmtree(folder / "killed")
            whole /= 2
            continue
        if not alive:
            break
        done += 1
    name = f"step-{STEPS:06d}"
    assert same(folder / "whole" / name, folder / "killed" / name)
    rows = [(folder / run / "log.csv").read_text().splitlines() for run in ("whole", "killed")]
    losses = [[row.split(",")[:2] for row in part] for part in rows]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS + 1
    return done


def test_a_training_run_killed_at_random_moments(tmp_path: Path) -> None:
    assert killed_training(tmp_path, 3, Random(0)) > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_training_runs_killed_many_times(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    kills = sum(killed_training(tmp_path / str(i), 12, Random(i)) for i in range(5))
    record_property("count", kills)
    record_property("detail", f"kills in 5 runs of {STEPS} steps")
    assert kills >= 10


def thing(kind: str, seed: int) -> Any:
    """A reference cache or a ranking that differs in every number."""
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.rand(4096, generator=draw)]
    if kind == "ranking":
        return Ranking(scores, [(64, 64)], "model", "ab" * 32)
    layers = [tuple(torch.rand(1, 4096, 2, 16, generator=draw) for _ in "kv") for _ in range(2)]
    return sra.ReferenceCache(layers, torch.arange(4096), Source("m", "w", "", "r", (4096,), ((64, 64),)))


def content(kept: Any) -> bytes:
    if isinstance(kept, bytes):
        return kept
    tensors = kept.scores if isinstance(kept, Ranking) else [x for pair in kept.layers for x in pair]
    return b"".join(np.asarray(x).tobytes() for x in tensors)


def save_for_ever(path: Path, kind: str) -> None:
    things = [thing(kind, seed) for seed in range(2)]
    while True:
        for one in things:
            one.save(path)


def killed_saving(folder: Path, kind: str, kills: int, random: Random) -> int:
    """How many kills left a file; each must be whole, one of the two that were being written in turn."""
    path, wanted, found = folder / kind, {content(thing(kind, seed)) for seed in range(2)}, 0
    load = Ranking.load if kind == "ranking" else sra.ReferenceCache.load
    for _ in range(kills):
        path.unlink(missing_ok=True)
        process = forked(save_for_ever, path, kind)
        if random.random() < 0.8:
            while not path.exists():
                time.sleep(0.001)
        assert kill(process, random.uniform(0, 0.05))
        if path.exists():
            found += 1
            assert content(load(path)) in wanted
    return found


@pytest.mark.parametrize("kind", ["ranking", "reference cache"])
def test_a_file_whose_writer_is_killed_is_whole(kind: str, tmp_path: Path) -> None:
    assert killed_saving(tmp_path, kind, 8, Random(0)) > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["ranking", "reference cache"])
def test_writers_killed_many_times(kind: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("count", 300)
    found = killed_saving(tmp_path, kind, 300, Random(1))
    record_property("detail", f"{found} of 300 kills after the first file was there")
    assert found > 100


def test_a_writer_without_a_draft_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kills do come in the middle of a write: straight into the file they leave a broken one."""

    def careless(path: Path, kind: str) -> None:
        data = [content(thing("reference cache", seed)) for seed in range(2)]
        while True:
            for one in data:
                with path.open("wb") as file:
                    for at in range(0, len(one), 4096):
                        file.write(one[at : at + 4096])

    monkeypatch.setattr(sys.modules[__name__], "save_for_ever", careless)
    monkeypatch.setattr(sra.ReferenceCache, "load", lambda path: path.read_bytes())
    with pytest.raises(AssertionError):
        killed_saving(tmp_path, "reference cache", 40, Random(0))

"""Copies of a patched pipeline, deep or through a file, are clean: dense, and with weights of their own."""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparse_ref_attn as sra
from tests.contract.state import GRID, kinds
from tests.pipelines import CASES, Case

EDGES = sra.SparseRef("edges", 0.3)
cases = pytest.mark.parametrize(
    "case", [CASES["kontext"], CASES["klein"], CASES["qwen_edit_plus"]], ids=lambda case: case.name
)


def shift(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)


@cache
def shifted(case: Case, name: str) -> np.ndarray:
    """What a new pipeline makes whose model of that name has other weights."""
    fresh = case.build()
    shift(getattr(fresh, name))
    return case.call(fresh)


def deep(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("case", "make"),
    [(CASES["kontext"], deep), (CASES["klein"], pickled), (CASES["qwen_edit_plus"], saved)],
    ids=["deep", "pickled", "saved"],
)
def test_copies_of_the_models_are_clean(case: Case, make: Any) -> None:
    pipe, plain, dense = case.build(), case.build(), case.dense()
    handle = sra.patch(pipe, EDGES)
    sparse = case.call(pipe)
    record = handle.record
    transformer, vae = make(pipe.transformer), make(pipe.vae)
    plain.transformer, plain.vae = transformer, vae
    assert np.array_equal(dense, case.call(plain))
    assert handle.record is record  # the copies did not drive the original's patch

    shift(transformer)
    shift(vae)
    for model in (transformer, vae):
        name = "transformer" if model is transformer else "vae"
        other = case.build()
        setattr(other, name, model)
        assert np.array_equal(shifted(case, name), case.call(other)), name  # the copy's own weights, encoding included

    assert np.array_equal(sparse, case.call(pipe))  # the original is as it was
    assert kinds(handle) == ["sparse"] * 3
    copied = sra.patch(other, GRID)  # and a copy can be patched
    case.call(other)
    assert kinds(copied) == ["sparse"] * 3
    copied.remove()
    handle.remove()


def test_shallow_copies_run_dense() -> None:
    """They share the dictionary of hooks, as the replicas of ``DataParallel`` do."""
    case = CASES["klein"]
    pipe, plain, dense = case.build(), case.build(), case.dense()
    handle = sra.patch(pipe, EDGES)
    plain.transformer = copy.copy(pipe.transformer)
    assert np.array_equal(dense, case.call(plain))
    case.call(pipe)
    assert kinds(handle) == ["sparse"] * 3


@cases
def test_copy_of_the_pipeline(case: Case) -> None:
    pipe, dense = case.build(), case.dense()
    handle = sra.patch(pipe, EDGES)
    sparse = case.call(pipe)
    twin = copy.deepcopy(pipe)
    assert np.array_equal(dense, case.call(twin))
    handle.remove()
    assert np.array_equal(dense, case.call(twin))
    handle = sra.patch(twin, EDGES)
    assert np.array_equal(sparse, case.call(twin))
    assert np.array_equal(dense, case.call(pipe))


def test_copy_with_the_users_wrapper_of_encode() -> None:
    """A copy keeps what stood on the VAE before the patch."""
    case = CASES["klein"]
    pipe = case.build()
    called = []

    class Wrapper:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            called.append(self)
            return type(pipe.vae).encode(pipe.vae, *args, **kwargs)

    pipe.vae.encode = mine = Wrapper()
    sra.patch(pipe, EDGES)
    twin = copy.deepcopy(pipe.vae)
    assert type(vars(twin)["encode"]) is Wrapper
    twin.encode(torch.zeros(1, 3, 64, 64))
    assert called == [vars(twin)["encode"]] != [mine]


@cases
def test_save_pretrained(case: Case, tmp_path: Path) -> None:
    plain, pipe = case.build(), case.build()
    sra.patch(pipe, EDGES)
    case.call(pipe)
    for name in ("transformer", "vae"):
        # Loaded weights lie elsewhere in memory, which may change the last bit: both pipelines load theirs.
        for which, kind in ((plain, "plain"), (pipe, "patched")):
            model = getattr(which, name)
            model.save_pretrained(tmp_path / kind / name)
            setattr(which, name, type(model).from_pretrained(tmp_path / kind / name))
        (a,), (b,) = ((tmp_path / kind / name).glob("*.safetensors") for kind in ("plain", "patched"))
        assert a.read_bytes() == b.read_bytes()
    assert np.array_equal(case.call(plain), case.call(pipe))

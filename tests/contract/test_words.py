"""What the library says: one line at patch time, and errors that name what must hold and what was got."""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import attention_dispatch

import sparse_ref_attn as sra
from sparse_ref_attn.hooks.diffusers import self_check
from sparse_ref_attn.models import supported
from sparse_ref_attn.models.flux2 import Flux2Adapter
from tests.contract.state import ALL, GRID, MASS, kinds, state
from tests.pipelines import CASES

KLEIN = CASES["klein"]


def test_one_line_at_patch_time(caplog: pytest.LogCaptureFixture) -> None:
    pipe = KLEIN.build()
    with caplog.at_level(logging.DEBUG, "sparse_ref_attn"):
        handle = sra.patch(pipe, MASS)
        assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
            ("INFO", f"patched FLUX.2: {MASS.describe()}")
        ]
        KLEIN.call(pipe, references=2, cfg=True)
        KLEIN.call(pipe, references=0)
        handle.remove()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_unsupported_class(wrapped: bool) -> None:
    class MyDiT(torch.nn.Module):
        pass

    class Pipe:
        transformer = MyDiT()

    with pytest.raises(sra.UnsupportedModelError) as caught:
        sra.patch(Pipe() if wrapped else MyDiT())
    text = str(caught.value)
    assert "MyDiT" in text.splitlines()[0]
    for name in supported():
        assert name in text
    assert "sparse_ref_attn.PlainAdapter(" in text
    assert "sparse_ref_attn.register_adapter(MyDiT, adapter)" in text


def test_nothing_to_patch() -> None:
    class Unet:
        unet = torch.nn.Linear(2, 2)

    for pipe in (Unet(), None, "model/path"):
        with pytest.raises(
            sra.UnsupportedModelError, match="must be a pipeline with a transformer, or a transformer, got"
        ):
            sra.patch(pipe)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"select": "grid"}, "config must be a SparseRef .* got dict"),
        (["recast"], "config must be a SparseRef .* got list"),
        ("grid", "a configuration's name must be one of faithful, balanced, fast, recast, sparse-context, got 'grid'"),
        (1.5, "got 1.5"),
    ],
)
def test_a_configuration_of_another_type(config: Any, words: str) -> None:
    pipe = KLEIN.build()
    before = state(pipe)
    with pytest.raises(sra.ConfigError, match=words):
        sra.patch(pipe, config)
    assert state(pipe) == before


@pytest.mark.parametrize("adapter", ["flux2", Flux2Adapter, 3])
def test_an_adapter_of_another_type(adapter: Any) -> None:
    pipe = KLEIN.build()
    before = state(pipe)
    with pytest.raises(sra.ConfigError, match=r"adapter must be an Adapter, such as PlainAdapter\(...\), got"):
        sra.patch(pipe, GRID, adapter=adapter)
    assert state(pipe) == before


@pytest.mark.parametrize("version", ["0.37.1", "0.9"])
def test_a_diffusers_that_is_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = KLEIN.build()
    before = state(pipe)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(sra.VersionError, match=f"patching needs diffusers >= 0.38, got {version}"):
        sra.patch(pipe, GRID)
    assert state(pipe) == before


@pytest.mark.parametrize("version", ["0.38.0", "0.41.2", "0.42.9.dev0"])
def test_a_diffusers_that_was_tested(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = KLEIN.build()
    before = state(pipe)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        handle = sra.patch(pipe, GRID)
    assert state(pipe) != before
    handle.remove()
    assert state(pipe) == before


@pytest.mark.parametrize("version", ["0.43.0", "1.0.0.dev0"])
def test_a_newer_diffusers_is_tried_out(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a process, and with nothing left in its tables."""
    pipe = KLEIN.build()
    before, listed = state(pipe), len(attention_dispatch._AttentionBackendRegistry._backends)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(self_check, "_WARNED", set())
    with pytest.warns(UserWarning, match=f"diffusers {version} is newer than those tested, 0.38 to 0.42"):
        sra.patch(pipe, GRID).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sra.patch(pipe, GRID).remove()
    assert state(pipe) == before
    assert len(attention_dispatch._AttentionBackendRegistry._backends) == listed


@pytest.mark.parametrize("how", ["not asked", "other arguments"])
def test_a_newer_diffusers_that_hands_attention_elsewhere(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = KLEIN.build()
    before, attend = state(pipe), attention_dispatch.dispatch_attention_fn
    others = {
        "not asked": lambda *args, backend, **more: attend(*args),
        "other arguments": lambda q, k, v, attention_mask: attend(q, k, v),
    }
    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", others[how])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.43.0")
    monkeypatch.setattr(self_check, "_WARNED", set())
    words = "it was not asked" if how == "not asked" else "TypeError: .*unexpected keyword argument"
    with pytest.raises(sra.VersionError, match=f"as 0.38 to 0.42 do; 0.43.0 does not: {words}"):
        sra.patch(pipe, GRID)
    assert state(pipe) == before


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(sra.VersionError, match=r"needs diffusers >= 0.38, and diffusers is not installed"):
        sra.patch(KLEIN.build(), GRID)


def test_a_registry_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hooks rely on is checked before anything is touched."""
    pipe = KLEIN.build()
    monkeypatch.delattr(attention_dispatch._AttentionBackendRegistry, "_constraints")
    with pytest.raises(sra.VersionError, match=r"must keep the attention backend registry's \['_constraints'\]"):
        sra.patch(pipe, GRID)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["model", "context"])
def test_the_users_attention_backend(when: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiling step's private backend delegates to it, and it is the user's again afterwards."""
    used: list[str] = []
    registry, names = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName
    for name in (names.NATIVE, names._NATIVE_MATH):
        monkeypatch.setitem(registry._backends, name, _noting(registry._backends[name], name.value, used))

    def choose(pipe: Any) -> None:
        if how == "model":
            pipe.transformer.set_attention_backend("_native_math")
            registry._active_backend = names.NATIVE  # the process's own is not what is tested

    def call(pipe: Any) -> np.ndarray:
        used.clear()
        if how == "model":
            return KLEIN.call(pipe)
        with attention_dispatch.attention_backend("_native_math"):
            return KLEIN.call(pipe)

    plain = KLEIN.build()
    choose(plain)
    dense, wanted = call(plain), list(used)
    assert wanted == ["_native_math"] * 12
    pipe = KLEIN.build()
    if when == "before":
        choose(pipe)
    handle = sra.patch(pipe, ALL)
    if when == "after":
        choose(pipe)
    KLEIN.call(pipe, references=0)
    before = state(pipe)
    assert np.array_equal(dense, call(pipe))
    assert used == wanted
    assert kinds(handle)[0] == "profile"
    assert state(pipe) == before
    handle.remove()
    assert np.array_equal(dense, call(pipe))
    assert used == wanted


def _noting(inner: Any, name: str, used: list[str]) -> Any:
    def backend(*args: Any, **kwargs: Any) -> Any:
        used.append(name)
        return inner(*args, **kwargs)

    return backend


def test_an_unknown_layout_runs_dense_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    class Blind(Flux2Adapter):
        def find(self, kwargs: dict[str, Any]) -> None:
            return None

    pipe = KLEIN.build()
    dense = KLEIN.call(pipe)
    sra.patch(pipe, GRID, adapter=Blind())
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        for _ in range(2):
            assert np.array_equal(dense, KLEIN.call(pipe))
    assert len(caplog.records) == 1
    assert "running dense: the layout of a call is not known (160 rows that the FLUX.2 adapter" in caplog.text

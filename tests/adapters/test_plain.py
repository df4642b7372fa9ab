"""A DiT that is not from diffusers: the example's, patched, and what the adapter makes of unusual ones."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

import sparse_ref_attn as sra
from tests import programs
from tests.adapters.witnesses import Attention, HiddenKeys, best

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_dit.py"
SIDE = 8
TOKENS = SIDE * SIDE
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_dit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(example: ModuleType, references: int = 2) -> tuple[Any, list[Tensor], Tensor]:
    torch.manual_seed(0)
    model = example.PlainDiT(depth=2).eval().requires_grad_(False)
    images = [torch.randn(TOKENS, example.CHANNELS) for _ in range(references)]
    return model, images, torch.randn(1, example.TEXT, example.WIDTH)


def given(example: ModuleType, images: list[Tensor], text: Tensor) -> dict[str, Tensor]:
    """One guided call's arguments."""
    tokens = torch.cat([torch.randn(1, TOKENS, example.CHANNELS), *(image[None] for image in images)], 1)
    return {
        "tokens": tokens.expand(2, -1, -1),
        "ids": torch.cat([example.grid(image, SIDE) for image in range(1 + len(images))]),
        "text": torch.cat([text, torch.zeros_like(text)]),
        "timestep": torch.ones(2),
    }


def test_the_example_runs(tmp_path: Path) -> None:
    """As a person starts it: it says what was kept and how long both runs took."""
    given = ("--side", str(SIDE), "--steps", "3", "--keep", "0.5")
    out = programs.run(programs.script, str(EXAMPLE), *given, log=tmp_path / "log")
    assert "1 profile, 2 sparse" in out
    assert "32 (50 %)" in out
    assert "FLOP ratio" in out
    assert "TFLOP dense" in out
    assert "after remove() bit for bit the same: True" in out


def test_sparse_is_the_dense_model_with_the_dropped_keys_masked(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, text = build(example)
    scores = np.random.default_rng(0).permutation(2 * TOKENS).astype(np.float32)
    select = sra.FromFunction(lambda references: torch.from_numpy(scores).split(references.sizes))
    handle = sra.patch(model, sra.SparseRef(select, 0.3), adapter=example.adapter(2))
    handle.begin(steps=2)
    call = given(example, images, text)
    sparse = model(**call)
    handle.remove()
    kept = best(scores, (TOKENS, TOKENS), 0.3)
    seen = torch.cat([torch.ones(example.TEXT + TOKENS).bool(), kept])
    with HiddenKeys({len(seen): seen}), monkeypatch.context() as patch:
        patch.setattr(example, "scaled_dot_product_attention", functional.scaled_dot_product_attention)
        wanted = model(**call)
    rows = seen[example.TEXT :]
    assert float((sparse - wanted)[:, rows].abs().max()) < ROUNDING
    assert not sparse[:, ~rows].any()
    assert float((sparse - model(**call))[:, :TOKENS].abs().max()) > 100 * ROUNDING


def test_positional_arguments_are_bound_by_name(example: ModuleType) -> None:
    model, images, text = build(example)
    call = given(example, images, text)
    with sra.patched(model, sra.SparseRef("grid", 0.3), adapter=example.adapter(2)) as handle:
        handle.begin(steps=1)
        assert torch.equal(model(*call.values()), model(**call))
        assert handle.record.steps[0].kept == 2 * 19


class _Listen(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Attention] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.calls.append(Attention(*(x.transpose(1, 2) for x in args[:3]), None))
        return func(*args, **(kwargs or {}))


def explicit(example: ModuleType, calls: list[Attention], item: slice) -> Tensor:
    at = example.TEXT + TOKENS
    return torch.stack([a.weights()[item, :, example.TEXT : at, at:].mean(dim=(0, 1, 2)) for a in calls]).mean(0)


def test_only_the_conditional_half_is_scored(example: ModuleType) -> None:
    """Guidance in one batch: the half with the prompt ranks, and both halves keep the same tokens."""
    model, images, text = build(example)
    call = given(example, images, text)
    handle = sra.patch(model, sra.SparseRef("mass", 0.5), adapter=example.adapter(2))
    handle.begin(steps=2)
    with _Listen() as listen:
        model(**call)
    profiled = list(listen.calls)
    handle.step(1)
    with _Listen() as listen:
        model(**call)
    mass = torch.cat(handle.record.mass or [])
    conditional, other = (explicit(example, profiled, slice(i, i + 1)) for i in (0, 1))
    assert float((mass - conditional).abs().max()) < 2e-6 * float(conditional.max())
    assert float((mass - other).abs().max()) > 1e-3 * float(other.max())
    assert {a.k.shape[:2] for a in listen.calls} == {(2, example.TEXT + TOKENS + TOKENS)}
    assert handle.record.layout.conditional == slice(0, 1)


def test_a_class_is_registered_with_its_subclasses(example: ModuleType) -> None:
    class Finetuned(example.PlainDiT):  # type: ignore[name-defined,misc]
        pass

    with pytest.raises(sra.UnsupportedModelError, match=r"must have an adapter, got .*Finetuned. Supported:\n  diff"):
        sra.patch(Finetuned(depth=1))
    sra.register_adapter(example.PlainDiT, example.adapter(1))
    with sra.patched(Finetuned(depth=1), sra.SparseRef("mass", 0.5)) as handle:
        assert "plain DiT" in repr(handle)


def test_an_unknown_layout_runs_dense_and_warns_once(example: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    model, images, text = build(example)
    call = given(example, images, text)
    plain = model(**call)
    adapter = sra.PlainAdapter("tokens", lambda kwargs: None, {"ids": 0}, text="text")
    with sra.patched(model, sra.SparseRef("grid", 0.3), adapter=adapter), caplog.at_level(logging.WARNING):
        assert torch.equal(model(**call), plain)
        assert torch.equal(model(**call), plain)
    assert [r.message for r in caplog.records if "running dense" in r.message] == [
        "running dense: the layout of a call is not known (192 rows that the plain adapter cannot tell apart)"
    ]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (((0, 64), (sra.Reference(64, 200),)), r"references must lie one after another within 192 rows"),
        (((0, 65), (sra.Reference(64, 128),)), r"one or more of the 192 rows and none of a reference's, got rows 0"),
        (((0, 0), (sra.Reference(64, 128),)), r"the generation must be one or more of the 192 rows"),
        (((190, 5), (sra.Reference(0, 64),)), r"the generation must be one or more of the 192 rows"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(example: ModuleType, found: Any, message: str) -> None:
    model, images, text = build(example)
    call = given(example, images, text)
    plain = model(**call)
    adapter = sra.PlainAdapter("tokens", lambda kwargs: found, {"ids": 0}, text="text")
    handle = sra.patch(model, sra.SparseRef("grid", 0.3), adapter=adapter)
    handle.begin(steps=1)
    with pytest.raises(sra.LayoutError, match=message):
        model(**call)
    handle.remove()
    assert torch.equal(model(**call), plain)


def test_attention_must_be_described_to_be_measured(example: ModuleType) -> None:
    model, images, text = build(example)
    silent = sra.PlainAdapter("tokens", example.find, {"ids": 0}, text="text")
    with pytest.raises(sra.IncompatibleError, match="tell the plain adapter the kind of each attention call"):
        sra.patch(model, sra.SparseRef("mass", 0.5), adapter=silent)
    with pytest.raises(sra.ConfigError, match=r'"double", "single" and "other", got \[.cross.\]'):
        sra.PlainAdapter("tokens", example.find, attention=["cross"])
    with pytest.raises(sra.ConfigError, match=r"positions must be one of rows \['ids'\], got 'id'"):
        sra.PlainAdapter("tokens", example.find, {"ids": 0}, positions="id")
    handle = sra.patch(model, sra.SparseRef("mass", 0.5), adapter=example.adapter(1))  # it has two blocks
    handle.begin(steps=1)
    with pytest.raises(sra.LayoutError, match=r"must name each of a forward's attention calls, got \('single',\)"):
        model(**given(example, images, text))
    handle.remove()
    assert model(**given(example, images, text)).shape == (2, 3 * TOKENS, example.CHANNELS)


class Odd(nn.Module):
    """Grouped-query attention at a scale of its own, then cross-attention to the text; a dict or latents come out."""

    def __init__(self, out: str = "tensor") -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 32), nn.Linear(8, 16), out

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor) -> Any:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k = self.kv(x).unflatten(-1, (2, 8)).transpose(1, 2)
        own = scaled_dot_product_attention(q, k, k, scale=3.0, enable_gqa=True)
        cross = self.kv(text).unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = scaled_dot_product_attention(own, cross, cross, enable_gqa=True).transpose(1, 2).flatten(2)
        return {"tensor": mixed, "dict": {"x": mixed}, "half": mixed[:, :16]}[self.out]


ODD = sra.PlainAdapter("x", lambda kwargs: ((0, 16), (sra.Reference(16, 9, (3, 3)),)), attention=["single", "other"])


def odd(out: str = "tensor") -> tuple[Odd, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Odd(out).requires_grad_(False), {
        "x": torch.randn(1, 25, 8), "text": torch.randn(1, 5, 8), "timestep": torch.ones(1)
    }  # fmt: skip


def test_grouped_queries_a_scale_and_cross_attention_are_measured_rightly() -> None:
    model, call = odd()
    handle = sra.patch(model, sra.SparseRef("mass", 4), adapter=ODD)
    handle.begin(steps=2)
    model(**call)
    handle.step(1)
    model(**call)
    q = model.q(call["x"]).double().unflatten(-1, (4, 8)).transpose(1, 2)
    k = model.kv(call["x"]).double().unflatten(-1, (2, 8)).transpose(1, 2)[:, [0, 0, 1, 1]]
    wanted = (3.0 * q @ k.mT).softmax(-1)[:, :, :16, 16:].mean(dim=(0, 1, 2))
    (mass,) = handle.record.mass or []
    assert float((mass - wanted).abs().max()) < 1e-6
    assert handle.record.steps[1].selection is not None
    assert handle.record.steps[1].selection.indices.tolist() == sorted(wanted.argsort(descending=True)[:4].tolist())


def test_outputs_of_other_forms() -> None:
    model, call = odd("half")
    with sra.patched(model, sra.SparseRef("grid", 4), adapter=ODD) as handle:
        handle.begin(steps=1)
        assert model(**call).shape == (1, 16, 32)
    model, call = odd("dict")
    with sra.patched(model, sra.SparseRef("grid", 4), adapter=ODD) as handle:
        handle.begin(steps=1)
        with pytest.raises(sra.LayoutError, match=r"output must be a tensor, a tuple .* got dict"):
            model(**call)
    assert model(**call)["x"].shape == (1, 25, 32)
    assert handle.flops() is None

"""Profiled in the first blocks of step 0: the explicit softmax's mass, and the masked model from there on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.models import named_model
from sparse_ref_attn.models.flux2 import Flux2Adapter
from sparse_ref_attn.selection import Selector
from tests.adapters.test_dropping import ROUNDING, error
from tests.adapters.test_mass import close, columns, joint
from tests.adapters.witnesses import GENERATION, Call, best, hidden_keys, witnessed
from tests.latents import CASES, each_case
from tests.pipelines import Case

BUILT = {"layers": 3, "single": 3, "heads": 3}
SHARES = (0.2, 0.6)
RISING = sra.Linear(SHARES[0], SHARES[-1])


def in_flight(select: Selector | str = "mass", first: int | None = 2, **settings: Any) -> sra.SparseRef:
    return sra.SparseRef(select, RISING, profile="in_flight", profile_blocks=first, **settings)


@contextmanager
def masked(transformer: torch.nn.Module, wanted: Sequence[tuple[Tensor, int]]) -> Iterator[None]:
    """Inside, call i of an unpatched `transformer` does not see the tokens that are not kept, from a block on."""
    calls, modes = iter(wanted), []

    def before(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kept, block = next(calls)
        modes.append(hidden_keys(Call(kwargs), kept, from_block=block))
        modes[-1].__enter__()

    def after(*arguments: Any) -> None:
        modes.pop().__exit__(None, None, None)

    hooks = [
        transformer.register_forward_pre_hook(before, with_kwargs=True),
        transformer.register_forward_hook(after),
    ]
    yield
    for hook in hooks:
        hook.remove()
    assert next(calls, None) is None


def most(case: Case) -> dict[str, Any]:
    return {"references": max(case.references), "cfg": case.cfg, "batch": max(case.batch), "steps": len(SHARES)}


WHOLE = ("kontext", "klein", "qwen_edit_plus", "longcat")
LATER = [(name, 0) for name in CASES if name != "klein_kv"] + [(name, 1) for name in (*WHOLE, "qwen_edit_plus_2511")]
"""Of pipelines of one transformer, one has references leave at another block in the other step."""


@pytest.mark.parametrize(("name", "later"), LATER)
@torch.no_grad()
def test_equals_explicit_attention(name: str, later: int) -> None:
    """The mass, every call of the run, and the image; `later` is where the references leave in the other step."""
    case, built = CASES[name], BUILT | {"single": 1}
    pipe = case.build(**built)
    handle = sra.patch(pipe, in_flight(sra.AttentionMass(blocks="all"), from_block=later))
    with witnessed(pipe.transformer) as calls:
        image = case.call(pipe, **most(case))
    record = handle.record
    handle.remove()
    branches = 1 + case.cfg
    assert [(s.kind, s.from_block, s.calls) for s in record.steps] == [
        ("in_flight", 2, branches), ("sparse", later, branches)
    ]  # fmt: skip

    measured = joint(calls[0])[:2]
    assert len(measured) == 2
    mass = torch.stack([columns(calls[0], a, case.name)[0].mean(dim=(0, 1, 2)) for a in measured]).mean(0)
    close(torch.cat(record.mass or []), mass)
    close(torch.cat(record.scores or []), mass)
    assert [(a.step, a.block) for a in record.attention] == [(0, 0), (0, 1)]

    ranked = torch.cat(record.scores or []).numpy()
    kept = [best(ranked, record.layout.sizes, share) for share in SHARES]
    assert [s.kept for s in record.steps] == [int(k.sum()) for k in kept]
    plan = [(kept[i // branches], 2 if i < branches else later) for i in range(len(calls))]
    fresh = case.model(**built)
    for call, (own, block) in zip(calls, plan, strict=True):
        rows = torch.cat([torch.ones(GENERATION).bool(), own])
        with hidden_keys(call, own, from_block=block):
            wanted = fresh(**call.given)[0]
        assert call.sample.shape == wanted.shape
        assert error(call.sample[:, rows], wanted[:, rows]) < ROUNDING
        assert not call.sample[:, ~rows].any()
    dense = fresh(**calls[-1].given)[0]
    assert error(calls[-1].sample[:, :GENERATION], dense[:, :GENERATION]) > 100 * ROUNDING
    if name in WHOLE and not later:
        unpatched = case.build(**built)
        with masked(unpatched.transformer, plan):
            np.testing.assert_allclose(image, case.call(unpatched, **most(case)), atol=1e-4)


FLUX, QWEN = BUILT["layers"] + BUILT["single"], BUILT["layers"]


@pytest.mark.parametrize(
    ("name", "select", "first", "blocks"),
    [
        ("klein", "mass", None, range(2)),  # a quarter of 6, rounded up; no single block is among them
        ("klein", "mass", 5, range(3, 5)),  # the single blocks among the first five
        ("klein", sra.AttentionMass(blocks="double"), 5, range(3)),
        ("klein", sra.AttentionMass(blocks=(1,)), None, [1]),  # as far as the indices reach
        ("klein", sra.AttentionMass(blocks=(1,)), 4, [1]),
        ("qwen_edit", "mass", None, [0]),
        ("qwen_edit", "mass", 2, [1]),
        ("qwen_edit", sra.AttentionMass(blocks="all"), 2, [0, 1]),
    ],
)
def test_which_blocks(name: str, select: Selector | str, first: int | None, blocks: Sequence[int]) -> None:
    case = CASES[name]
    pipe = case.build(**BUILT)
    handle = sra.patch(pipe, in_flight(select, first))
    case.call(pipe, steps=2)
    assert [a.block for a in handle.record.attention] == list(blocks)
    assert handle.record.steps[0].from_block == (first or max(blocks) + 1)


def test_default_is_a_quarter_of_the_blocks() -> None:
    for name, first in (("kontext", 15), ("klein-9b", 8), ("klein-4b", 7), ("qwen-image-edit", 15)):
        model = named_model(name)
        estimate = sra.estimate(model, steps=4, config=sra.ReCAST(profile="in_flight"))
        assert estimate.from_block == (first, 0, 0, 0)


@each_case(lambda case: case.name in ("kontext", "klein", "qwen_edit_plus_2511"))
def test_a_uniform_attention_keeps_every_token_bit_for_bit(case: Case) -> None:
    """The guard decides in the middle of the step; the rest of it then runs dense."""
    guard = sra.config.UniformGuard(top_quarter=1.0, mass=1.0)
    pipe = case.build(**BUILT)
    dense = case.call(pipe, cfg=case.cfg)
    handle = sra.patch(pipe, in_flight(guard=guard))
    assert np.array_equal(dense, case.call(pipe, cfg=case.cfg))
    assert [(s.kind, s.from_block) for s in handle.record.steps] == [("profile", 0), ("dense", 0), ("dense", 0)]


def test_a_budget_by_mass_and_a_mix_with_pixels() -> None:
    case = CASES["klein"]
    pipe = case.build(**BUILT)
    select = sra.Mix(((sra.AttentionMass(value_norm=True), 0.5), (sra.Edges(), 0.5)))
    config = sra.SparseRef(select, sra.TopP(0.5), profile="in_flight")
    handle = sra.patch(pipe, config)
    case.call(pipe, references=2)
    first, *others = handle.record.steps
    assert (first.kind, first.from_block) == ("in_flight", 2)
    assert {s.kept for s in others} == {first.kept}
    assert sum(handle.record.layout.sizes) > first.kept


def test_batched_guidance_scores_the_conditional_half() -> None:
    """A pipeline that batches both branches: the layout says which items count."""

    class Batched(Flux2Adapter):
        def layout(self, kwargs: Any, found: Any) -> Any:
            layout = super().layout(kwargs, found)
            return sra.types.TokenLayout(
                layout.rows, layout.text, layout.generation, layout.references, conditional=slice(1, 2)
            )

    case = CASES["klein"]
    pipe = case.build(**BUILT)
    handle = sra.patch(pipe, in_flight(), adapter=Batched())
    with witnessed(pipe.transformer) as calls:
        case.call(pipe, batch=2)
    measured = joint(calls[0])[:2]
    wanted = torch.stack([columns(calls[0], a, "klein")[0][1].mean(dim=(0, 1)) for a in measured]).mean(0)
    close(torch.cat(handle.record.mass or []), wanted)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"profile": "flight"}, r"must be one of step, in_flight, got 'flight'"),
        ({"profile_blocks": 3}, 'with profile="in_flight" only, got 3'),
        ({"profile": "in_flight", "profile_blocks": 0}, "at least 1, got 0"),
        ({"profile": "in_flight", "profile_blocks": True}, "got True"),
        ({"profile": "in_flight", "select": "edges"}, "measures attention, got Edges"),
        ({"profile": "in_flight", "select": sra.Downscale()}, "measures attention, got Downscale"),
        ({"profile": "in_flight", "select": sra.AttentionMass(steps=(0, 1))}, r"step 0 alone, got steps \(0, 1\)"),
        ({"profile": "in_flight", "execute": "cache"}, "without rerank_every, got 'cache' and None"),
        ({"profile": "in_flight", "rerank_every": 2}, "without rerank_every, got 'tokens' and 2"),
    ],
)
def test_settings_that_cannot_hold(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(sra.ConfigError, match=words):
        sra.SparseRef(**settings)


def test_blocks_that_cannot_be_measured_in_flight() -> None:
    pipe = CASES["klein"].build()
    for config, words in (
        (in_flight(first=4), "before the last of the model's 4 blocks, got 4"),
        (in_flight(sra.AttentionMass(blocks=(3,)), None), "before the last of the model's 4 blocks, got 4"),
        (in_flight(sra.AttentionMass(blocks=(0, 2))), r"among the first 2 \(profile_blocks\), got \(0, 2\)"),
    ):
        with pytest.raises(sra.ConfigError, match=words):
            sra.patch(pipe, config)
    assert not pipe.transformer._forward_hooks
    case = CASES["klein_kv"]
    pipe = case.build()
    sra.patch(pipe, in_flight())
    with pytest.raises(sra.IncompatibleError, match=r"stores the references' keys.*profile=\"step\""):
        case.call(pipe)


def test_settings_travel() -> None:
    config = in_flight(from_block=3)
    assert sra.SparseRef.from_json(config.to_json()) == config
    assert "from block 3" in config.describe()
    assert "in flight" in config.describe()
    before = {k: v for k, v in sra.SparseRef("grid").to_dict().items() if k not in ("from_block", "profile")}
    assert sra.SparseRef.from_dict(before) == sra.SparseRef("grid")

"""Measured steps take the LSE of the model's own attention: same output, same mass, less work."""

from __future__ import annotations

from collections.abc import Iterator

import PIL.Image
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_ref_attn as sra
from sparse_ref_attn.eval.embedded import kontext_pipeline
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.ops.with_lse import forget_proofs
from sparse_ref_attn.run import profile as profiling
from tests.latents import CASES

MODELS = ("kontext", "klein", "klein_kv", "qwen_edit", "qwen_edit_plus")


@pytest.fixture(autouse=True)
def unproved() -> Iterator[None]:
    forget_proofs()
    yield
    forget_proofs()


def run(
    name: str, select: sra.selection.Selector, keep: float = 1.0, **request: object
) -> tuple[sra.PatchHandle, Tensor]:
    case = CASES[name]
    pipe = case.build(heads=3)
    handle = sra.patch(pipe, sra.SparseRef(select, keep))
    return handle, case.call(pipe, references=max(case.references), steps=2, **request)


@pytest.mark.parametrize("name", MODELS)
def test_a_full_step_is_bit_for_bit_what_it_was(name: str) -> None:
    case = CASES[name]
    want = case.call(case.build(heads=3), references=max(case.references), steps=2)
    handle, got = run(name, sra.AttentionMass(blocks="all"))
    assert handle.record.attention
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))


@pytest.mark.parametrize(
    "select", [sra.AttentionMass(blocks="all"), sra.SelfAttention(blocks="all")], ids=["mass", "self"]
)
@pytest.mark.parametrize("name", MODELS)
def test_every_measured_block_gets_one_and_the_slow_way_is_charged(
    name: str, select: sra.selection.Selector, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    real = profiling.attention_mass

    def counting(q: Tensor, k: Tensor, span: tuple[int, int], **options: object) -> Tensor:
        given.append((options.get("lse") is not None, span[1] - span[0], k.shape[1]))
        return real(q, k, span, **options)

    monkeypatch.setattr(profiling, "attention_mass", counting)
    handle, _ = run(name, select, 0.5)
    fast, masses = handle.record, list(given)
    assert masses
    assert all(lse for lse, _, _ in masses)
    given.clear()
    with sdpa_kernel(SDPBackend.MATH):
        slow = run(name, select, 0.5)[0].record
    assert [lse for lse, _, _ in given] == [False] * len(masses)
    assert fast.scores is not None
    assert slow.scores is not None
    for a, b in zip(fast.scores, slow.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    # keys that were multiplied: the references' own, or all of them
    _, span, keys = masses[0]
    if len({m[1:] for m in masses}) == 1:
        assert slow.scoring_flops / fast.scoring_flops == pytest.approx(keys / span)
    assert slow.scoring_flops > fast.scoring_flops > 0


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
def test_the_estimate_is_what_is_charged(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    handle = sra.patch(pipe, sra.SparseRef("mass", 0.5))
    case.call(pipe, references=1, steps=2)
    record = handle.record
    shape = adapter_for(pipe.transformer).shape(pipe.transformer)
    blocks = len({(a.step, a.block) for a in record.attention})
    layout = record.layout
    conditional = layout.conditional
    items = record.batch if conditional is None else len(range(record.batch)[conditional])
    products = blocks * items * layout.generation[1] * layout.reference_tokens
    assert record.scoring_flops == 2 * shape.heads * shape.head_dim * products


def test_a_batch_takes_the_lse_of_its_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    real = profiling.attention_mass

    def counting(q: Tensor, k: Tensor, span: tuple[int, int], **options: object) -> Tensor:
        mass = real(q, k, span, **options)
        given.append(options.get("lse") is not None)
        torch.testing.assert_close(mass, real(q, k, span, **options | {"lse": None}), rtol=1e-4, atol=1e-7)
        return mass

    monkeypatch.setattr(profiling, "attention_mass", counting)
    pipe = kontext_pipeline(size="tiny")
    pipe.set_progress_bar_config(disable=True)
    images = [[PIL.Image.new("RGB", (32, 32), "red")], [PIL.Image.new("RGB", (64, 32), "blue")]]
    sra.batch(
        pipe, ["a cat", "a dog"], images, config=sra.SparseRef("mass", 0.5), num_inference_steps=2, height=32, width=32,
        max_area=32 * 32, _auto_resize=False, generators=[torch.Generator().manual_seed(i) for i in range(2)],
    )  # fmt: skip
    assert given
    assert all(given)

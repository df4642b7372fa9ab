"""Measured attention equals the explicit softmax in float64, of the q and k that the model attended with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.patching import PatchHandle
from sparse_ref_attn.selection import Selector
from tests.adapters.witnesses import GENERATION, Attention, Call, witnessed
from tests.latents import CASES
from tests.pipeline_arguments import NEGATIVE, PROMPTS
from tests.pipelines import Case

ROUNDING = 2e-6  # of the largest: float32 sums of a hundred terms
MODELS = ("kontext", "klein", "klein_kv", "qwen_edit", "qwen_edit_plus")


def profiled(
    name: str, select: Selector, references: int | None = None, steps: int = 2, **request: object
) -> tuple[PatchHandle, list[Call], Case]:
    """A sparse run, its handle, and every transformer call."""
    case = CASES[name]
    pipe = case.build(heads=3)
    handle = sra.patch(pipe, sra.SparseRef(select, 0.5))
    with witnessed(pipe.transformer) as calls:
        case.call(
            pipe,
            references=max(case.references) if references is None else references,
            steps=steps,
            **request,
        )
    return handle, calls, case


def joint(call: Call) -> list[Attention]:
    """The attention in which the generation takes part, one a block."""
    return [a for a in call.attention if a.k.shape[1] == call.text + call.rows]


def columns(call: Call, a: Attention, name: str) -> tuple[Tensor, slice]:
    """Generation's attention to the reference tokens (B, H, N, R), and the references' keys."""
    first = name == "klein_kv"
    keys = slice(call.text, call.text + call.rows - GENERATION)
    keys = keys if first else slice(keys.start + GENERATION, keys.stop + GENERATION)
    rows = slice(-GENERATION, None) if first else slice(call.text, call.text + GENERATION)
    return a.weights()[:, :, rows, keys], keys


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert float((got.double() - wanted).abs().max()) <= ROUNDING * float(wanted.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_mass_by_block_and_head(name: str) -> None:
    """Share, entropy and top quarter of every reference, block and head."""
    case = CASES[name]
    handle, calls, _ = profiled(name, sra.AttentionMass(blocks="all"), cfg=case.cfg, batch=max(case.batch))
    blocks = joint(calls[0])
    measured = handle.record.attention
    assert [(a.step, a.block) for a in measured] == [(0, i) for i in range(len(blocks))]
    assert len(blocks) == (2 if name.startswith("qwen") else 4)
    for got, a in zip(measured, blocks, strict=True):
        mass = columns(calls[0], a, name)[0].mean(dim=(0, 2)).split(handle.record.layout.sizes, dim=-1)
        close(got.mass, torch.stack([part.sum(-1) for part in mass]))
        parts = [(part / part.sum(-1, keepdim=True)).numpy() for part in mass]
        close(got.entropy, torch.tensor(np.array([-(p * np.log2(p)).sum(-1) for p in parts])))
        top = [np.sort(p, axis=-1)[:, ::-1][:, : int(np.ceil(p.shape[-1] / 4))].sum(-1) for p in parts]
        close(got.top_quarter, torch.tensor(np.array(top)))
        assert float(got.mass.min()) > 1e-3  # the references are looked at


@pytest.mark.parametrize(
    ("blocks", "name", "chosen"),
    [("all", "kontext", range(4)), ("all", "klein", range(4)), ("all", "klein_kv", range(4)),
     ("all", "qwen_edit", range(2)), ("all", "qwen_edit_plus", range(2)),
     ("single", "kontext", (2, 3)), ("single", "klein_kv", (2, 3)), ("single", "qwen_edit", (0, 1)),
     ("double", "klein", (0, 1)), ("double", "qwen_edit_plus", (0, 1)), ((1,), "klein_kv", (1,)),
     ((1,), "qwen_edit", (1,)), (range(0, 2), "kontext", (0, 1)), (range(0, 2), "qwen_edit_plus", (0, 1))],
    ids=str,
)  # fmt: skip
def test_mass_of_each_token(blocks: str | Sequence[int], name: str, chosen: Sequence[int]) -> None:
    """Eq. (2)-(3): the mean over the generation's queries, heads, items and the chosen blocks."""
    case = CASES[name]
    handle, calls, _ = profiled(name, sra.AttentionMass(blocks=blocks), batch=max(case.batch))
    wanted = torch.stack([columns(calls[0], a, name)[0].mean(dim=(0, 1, 2)) for a in joint(calls[0])])[list(chosen)]
    close(torch.cat(handle.record.mass or []), wanted.mean(0))
    close(torch.cat(handle.record.scores or []), wanted.mean(0))


def test_single_means_the_last_two_thirds_where_all_blocks_are_double() -> None:
    case = CASES["qwen_edit"]
    pipe = case.build(layers=6)
    handle = sra.patch(pipe, sra.SparseRef("mass", 0.5))
    case.call(pipe)
    assert [a.block for a in handle.record.attention] == [2, 3, 4, 5]


@pytest.mark.parametrize("steps", [(0,), (1,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["kontext", "qwen_edit_plus"])
def test_steps(name: str, steps: tuple[int, ...]) -> None:
    """Dense until the last of them, then sparse; the mean of them is what ranks."""
    handle, calls, _ = profiled(name, sra.AttentionMass(blocks="all", steps=steps), steps=4)
    kinds = [step.kind for step in handle.record.steps]
    assert kinds == ["profile" if i in steps else "dense" if i < steps[-1] else "sparse" for i in range(4)]
    terms = [columns(calls[i], a, name)[0].mean(dim=(0, 1, 2)) for i in steps for a in joint(calls[i])]
    close(torch.cat(handle.record.mass or []), torch.stack(terms).mean(0))


@pytest.mark.parametrize("stride", [2, 3, 1000])
@pytest.mark.parametrize("name", ["kontext", "klein_kv"])
def test_every_nth_query(name: str, stride: int) -> None:
    handle, calls, _ = profiled(name, sra.AttentionMass(blocks="all", query_stride=stride))
    if name == "klein_kv":  # the text stands before the references, the generation after them
        assert columns(calls[0], joint(calls[0])[0], name)[0].shape[2] == GENERATION
    terms = [columns(calls[0], a, name)[0][:, :, ::stride].mean(dim=(0, 1, 2)) for a in joint(calls[0])]
    close(torch.cat(handle.record.mass or []), torch.stack(terms).mean(0))


@pytest.mark.parametrize("name", MODELS)
def test_value_norms_weigh_each_item_and_head(name: str) -> None:
    """ToPi: || v || times the attention, before the means over items and heads."""
    case = CASES[name]
    select = sra.AttentionMass(blocks="all", value_norm=True)
    handle, calls, _ = profiled(name, select, batch=max(case.batch))
    terms, plain = [], []
    for a in joint(calls[0]):
        weights, keys = columns(calls[0], a, name)
        norms = a.v[:, keys].double().norm(dim=-1).transpose(1, 2)
        terms.append((weights.mean(2) * norms).mean(dim=(0, 1)))
        plain.append(weights.mean(dim=(0, 1, 2)))
    close(torch.cat(handle.record.scores or []), torch.stack(terms).mean(0))
    close(torch.cat(handle.record.mass or []), torch.stack(plain).mean(0))


@pytest.mark.parametrize("name", MODELS)
def test_self_attention_within_each_reference(name: str) -> None:
    """Queries and keys of one reference; the softmax runs over every key that the queries attend to."""
    handle, calls, _ = profiled(name, sra.SelfAttention(blocks="all"))
    sizes = handle.record.layout.sizes
    first = 0 if name == "klein_kv" else calls[0].text + GENERATION
    total = sum(sizes) if name == "klein_kv" else calls[0].text + calls[0].rows
    blocks = [a.weights() for a in calls[0].attention if a.q.shape[1] == a.k.shape[1] == total]
    wanted, at = [], first
    for size in sizes:
        own = slice(at, at + size)
        wanted.append(torch.stack([w[:, :, own, own].mean(dim=(0, 1, 2)) for w in blocks]).mean(0))
        at += size
    assert len(blocks) == (2 if name.startswith("qwen") else 4)
    close(torch.cat(handle.record.scores or []), torch.cat(wanted))
    assert handle.record.mass is None


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen_edit_plus"])
def test_only_the_conditional_branch_is_scored(name: str) -> None:
    """With guidance the call with the prompt is measured, the one with the negative prompt is not."""
    select = sra.AttentionMass(blocks="all")
    guided, calls, _ = profiled(name, select, cfg=True)
    plain, alone, _ = profiled(name, select)
    prompts = [call.given["encoder_hidden_states"] for call in (alone[0], *calls[:2])]
    if name == "qwen_edit_plus":  # a token a byte, padded alike
        assert calls[1].text - calls[0].text == len(NEGATIVE) - len(PROMPTS[0])
    else:
        assert torch.equal(prompts[1], prompts[0])
        assert not torch.equal(prompts[2], prompts[0])
    assert len(guided.record.attention) == len(plain.record.attention)
    wanted = torch.stack([columns(calls[0], a, name)[0].mean(dim=(0, 1, 2)) for a in joint(calls[0])]).mean(0)
    other = torch.stack([columns(calls[1], a, name)[0].mean(dim=(0, 1, 2)) for a in joint(calls[1])]).mean(0)
    close(torch.cat(guided.record.mass or []), wanted)
    assert float((wanted - other).abs().max()) > 100 * ROUNDING * float(wanted.max())


def test_masked_prompt_rows_take_no_mass() -> None:
    """Qwen's padded prompts: the explicit softmax leaves them out, and so does the measured one."""
    handle, calls, _ = profiled("qwen_edit", sra.AttentionMass(blocks="all"), batch=2)
    blocks = joint(calls[0])
    assert all(a.mask is not None and int((~a.mask.bool()).sum()) > 2 for a in blocks)
    unmasked = [Attention(a.q, a.k, a.v, None) for a in blocks]
    wanted = torch.stack([columns(calls[0], a, "qwen_edit")[0].mean(dim=(0, 1, 2)) for a in blocks]).mean(0)
    wrong = torch.stack([columns(calls[0], a, "qwen_edit")[0].mean(dim=(0, 1, 2)) for a in unmasked]).mean(0)
    close(torch.cat(handle.record.mass or []), wanted)
    assert float((wanted - wrong).abs().max()) > 100 * ROUNDING * float(wanted.max())


def test_klein_kv_has_no_reference_queries_to_measure_after_its_first_step() -> None:
    """It stays dense, and says so instead of being silently slow."""
    handle, _, _ = profiled("klein_kv", sra.SelfAttention(steps=(1,)), steps=3)
    assert [step.kept for step in handle.record.steps] == [handle.record.layout.reference_tokens] * 3
    assert len(handle.notes) == 1
    assert "no attention was measured in the profiling steps [1]" in handle.notes[0]

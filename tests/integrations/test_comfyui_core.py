"""The nodes on a real ComfyUI: its own patcher, samplers and models, tiny and random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from integrations.comfyui.nodes import KEY, NODE_CLASS_MAPPINGS, OFFERED, SparseReferences, TokensRead
from integrations.comfyui.rows import kinds_of
from sparse_ref_attn.errors import (
    ConfigError,
    IncompatibleError,
    LayoutError,
    PixelsUnavailableError,
    SparseRefError,
    UnsupportedModelError,
)
from tests.integrations.core import condition, core, latent, needs_core, patcher, sample

pytestmark = needs_core
NAMES = ("kontext", "flux2", "qwen")
SIZES = ((8, 6), (4, 8))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    made = patcher(request.param)
    if request.param == "qwen" and not _calls_post_input(made):
        pytest.skip("this ComfyUI's Qwen-Image calls no post_input patches")
    return request.param


def _calls_post_input(model: Any) -> bool:
    seen: list[int] = []
    clone = model.clone()
    clone.set_model_patch(lambda args: seen.append(1) or args, "post_input")
    sample(clone, "qwen", condition(1, [latent("qwen", 4, 4, 1)]), steps=1)
    return bool(seen)


def references(name: str, count: int = 2) -> list[Tensor]:
    return [latent(name, *SIZES[i], seed=20 + i) for i in range(count)]


def patched(model: Any, rule: str = "grid", share: float = 0.25, **photos: Tensor) -> Any:
    return SparseReferences().patch(model, rule, share, 0, **photos)[0]


def record(model: Any) -> Any:
    return model.model_options["transformer_options"][KEY].record


def image_rows(model: Any, run: Any) -> list[int]:
    """Rows of the image stream in each call of the first block."""
    rows: list[int] = []
    inner = model.model.diffusion_model
    first = (inner.double_blocks if hasattr(inner, "double_blocks") else inner.transformer_blocks)[0]

    def note(module: Any, args: Any, kwargs: Any) -> None:
        rows.append((kwargs["img"] if "img" in kwargs else kwargs["hidden_states"]).shape[1])

    handle = first.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return rows


def test_all_tokens_are_the_model_as_it_is(name: str) -> None:
    model, positive = patcher(name), condition(1, references(name))
    dense = sample(model, name, positive)
    assert torch.equal(sample(patched(model, share=1.0), name, positive), dense)
    assert not torch.equal(sample(patched(model, share=0.25), name, positive), dense)


def test_the_model_that_was_given_stays_as_it_was(name: str) -> None:
    model, positive = patcher(name), condition(1, references(name))
    dense, wrappers = sample(model, name, positive), dict(model.wrappers)
    sparse = patched(model)
    sample(sparse, name, positive)
    assert model.wrappers == wrappers
    assert KEY not in model.model_options["transformer_options"]
    assert "post_input" not in model.model_options["transformer_options"].get("patches", {})
    assert torch.equal(sample(model, name, positive), dense)  # as when the node is bypassed


def test_every_block_runs_on_the_rows_that_are_kept(name: str) -> None:
    model, positive = patcher(name), condition(1, references(name))
    patch = model.model.diffusion_model.patch_size
    generation, total = 64 // patch**2, 80 // patch**2
    sparse = patched(model, share=0.5)
    rows = image_rows(sparse, lambda: sample(sparse, name, positive, steps=3))
    assert rows == [generation + total // 2] * 3
    assert [r.grid for r in record(sparse).layout.references] == [(h // patch, w // patch) for h, w in SIZES]


def test_dropped_rows_are_never_computed(name: str) -> None:
    """What the dropped tokens hold does not matter; what the kept ones hold does."""
    model, given = patcher(name), references(name, 1)
    sparse = patched(model, share=0.5)
    before = sample(sparse, name, condition(1, given), steps=2)
    patch = model.model.diffusion_model.patch_size
    kept = record(sparse).steps[-1].selection.split()[0]
    keep = torch.zeros(SIZES[0][0] // patch * (SIZES[0][1] // patch), dtype=torch.bool)
    keep[kept] = True
    cells = keep.reshape(SIZES[0][0] // patch, -1).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    for where, same in ((~cells, True), (cells, False)):
        other = given[0].clone()
        other[..., where] += 1.0
        found = sample(patched(model, share=0.5), name, condition(1, [other]), steps=2)
        assert torch.equal(found, before) is same


def test_kept_rows_have_their_own_places(name: str) -> None:
    """The same as every row under a mask that hides the dropped ones' keys: what is kept stands where it stood."""
    model, positive = patcher(name), condition(1, references(name))
    sparse = patched(model, share=0.5)
    found = sample(sparse, name, positive)
    kept, total = record(sparse).steps[-1].selection.indices, record(sparse).layout.reference_tokens

    def hide(attend: Any, q: Tensor, k: Tensor, v: Tensor, n: int, *args: Any, **kwargs: Any) -> Any:
        q, k, v = (x if kwargs.get("skip_reshape") else x.unflatten(-1, (n, -1)).transpose(1, 2) for x in (q, k, v))
        seen = torch.ones(k.shape[2], dtype=torch.bool)
        seen[-total:] = False
        seen[k.shape[2] - total + kept] = True
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen[None]).transpose(1, 2).flatten(2)

    masked = model.clone()
    masked.model_options["transformer_options"]["optimized_attention_override"] = hide
    assert torch.allclose(sample(masked, name, positive), found, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(sample(model, name, positive), found, atol=1e-1)


def test_references_with_a_time_of_their_own(name: str) -> None:
    """FLUX.2 and Qwen may modulate references as at the end of the sampling; their rows are told by slices."""
    if name == "kontext":
        pytest.skip("FLUX.1's own embeddings have no such time")
    model = patcher(name)
    positive = condition(1, references(name), reference_latents_method="index_timestep_zero")
    dense = sample(model, name, positive)
    assert torch.equal(sample(patched(model, share=1.0), name, positive), dense)
    sparse = patched(model, share=0.5)
    found = sample(sparse, name, positive)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, dense)
    assert not torch.equal(found, sample(sparse, name, condition(1, references(name))))


def test_attention_is_what_ranks(name: str) -> None:
    """ReCAST's scores are the mass that generation tokens pay, by plain softmax over what ComfyUI's attention got."""
    model, positive = patcher(name), condition(1, references(name))
    patch, heads = model.model.diffusion_model.patch_size, []

    def softmax(attend: Any, q: Tensor, k: Tensor, v: Tensor, n: int, *args: Any, **kwargs: Any) -> Any:
        by_head = [x if kwargs.get("skip_reshape") else x.unflatten(-1, (n, -1)).transpose(1, 2) for x in (q, k)]
        heads.append(torch.softmax(by_head[0] @ by_head[1].transpose(-1, -2) * by_head[0].shape[-1] ** -0.5, -1))
        return attend(q, k, v, n, *args, **kwargs)

    sparse = patched(model, "ReCAST flat", 0.55)
    sparse.model_options["transformer_options"]["optimized_attention_override"] = softmax
    sample(sparse, name, positive, steps=4)
    kinds = kinds_of(model.model.diffusion_model)
    first, generation = [], 64 // patch**2
    for block, weights in enumerate(heads[: len(kinds)]):
        text = weights.shape[-1] - 144 // patch**2
        if kinds[block] == "single" or ("single" not in kinds and block >= len(kinds) // 3):
            first.append(weights[:, :, text : text + generation, text + generation :].mean((0, 1, 2)))
    assert torch.allclose(torch.cat(record(sparse).scores), torch.stack(first).mean(0), atol=1e-6)
    assert [step.kind for step in record(sparse).steps] == ["profile", "sparse", "sparse", "sparse"]
    kept = [step.kept for step in record(sparse).steps]
    assert sum(kept) / (4 * kept[0]) == pytest.approx(0.55, abs=0.03)


@pytest.mark.parametrize("both", [False, True])
def test_guidance_has_the_prompts_selection(name: str, both: bool) -> None:
    model, given = patcher(name), references(name)
    negative = condition(5, given if both else ())
    sparse = patched(model, "ReCAST flat", 0.5)
    sample(sparse, name, condition(1, given), negative, steps=4, cfg=3.0)
    found = record(sparse)
    assert [step.kind for step in found.steps] == ["profile", "sparse", "sparse", "sparse"]
    assert len(found.attention) == len([k for k in kinds_of(model.model.diffusion_model) if k == "single"] or range(3))
    alone = patched(model, "ReCAST flat", 0.5)
    sample(alone, name, condition(1, given), steps=4)
    assert torch.allclose(torch.cat(found.scores), torch.cat(record(alone).scores), atol=1e-5)


def test_conditions_that_cannot_run_together_rank_each_their_own_references(name: str) -> None:
    model = patcher(name)
    one, other = [latent(name, *SIZES[0], seed=20)], [latent(name, *SIZES[1], seed=77)]
    sparse = patched(model, "cosine", 0.5)
    sample(sparse, name, condition(1, one), condition(5, other), cfg=3.0, steps=2)
    mixed = record(sparse)
    sample(sparse, name, condition(1, one), steps=2)
    assert mixed.layout.references == record(sparse).layout.references
    assert torch.equal(mixed.steps[-1].selection.indices, record(sparse).steps[-1].selection.indices)


def test_a_call_belongs_to_the_step_of_its_noise_level(name: str) -> None:
    """Heun asks at the end of each step but the last: at the noise level that the next one begins with."""
    sparse = patched(patcher(name), "ReCAST flat", 0.5)
    sample(sparse, name, condition(1, references(name)), steps=4, sampler="heun")
    assert [step.index for step in record(sparse).steps] == [0, 1, 2, 3]
    assert [step.calls for step in record(sparse).steps] == [1, 2, 2, 2]
    sample(sparse, name, condition(1, references(name)), steps=4, sampler="dpm_2")  # asks halfway between
    assert [step.calls for step in record(sparse).steps] == [2, 2, 2, 1]


def test_photos_are_what_edges_look_at(name: str) -> None:
    photo = torch.zeros(1, 64, 48, 3)
    photo[:, 32:, :24] = 1.0
    sparse = patched(patcher(name), "edges", 0.25, reference_1=photo)
    sample(sparse, name, condition(1, references(name, 1)), steps=2)
    scores = record(sparse).scores[0].reshape(record(sparse).layout.references[0].grid)
    assert scores[: scores.shape[0] // 4].max() < scores.max()
    with pytest.raises(PixelsUnavailableError, match=r"to reference_1, reference_2, \.\.\.; got 1 for 2"):
        sample(sparse, name, condition(1, references(name)), steps=2)


@pytest.mark.parametrize("rule", [rule for rule in OFFERED if rule not in ("edges", "saliency", "sparse-context")])
def test_every_rule_that_is_offered_runs(rule: str) -> None:
    sparse = patched(patcher("kontext"), rule, 0.5)
    found = sample(sparse, "kontext", condition(1, references("kontext")), steps=4)
    assert torch.isfinite(found).all()
    kept = [step.kept for step in record(sparse).steps]
    if rule == "recast":  # its guard finds the attention of random weights even, keeps all, and says so
        assert record(sparse).notes, record(sparse).steps
    else:
        assert sum(kept) / (4 * record(sparse).layout.reference_tokens) == pytest.approx(0.5, abs=0.06)


def test_a_node_behind_another_takes_its_place(name: str) -> None:
    model, positive = patcher(name), condition(1, references(name))
    twice = patched(patched(model, share=0.75), share=0.25)
    assert torch.equal(sample(twice, name, positive), sample(patched(model, share=0.25), name, positive))


def test_a_node_behind_it_may_clone_the_model(name: str) -> None:
    positive = condition(1, references(name))
    sparse = patched(patcher(name), "ReCAST flat", 0.5)
    before = sample(sparse, name, positive)
    clone = sparse.clone()
    assert torch.equal(sample(clone, name, positive), before)
    assert record(clone) is record(sparse)
    assert record(clone).steps[-1].kept < record(clone).layout.reference_tokens


def test_without_references_the_model_is_as_it_is(name: str) -> None:
    model = patcher(name)
    assert torch.equal(sample(patched(model), name, condition(1)), sample(model, name, condition(1)))


def test_joint_masks_lose_the_rows_that_are_dropped() -> None:
    model, given = patcher("kontext"), references("kontext", 1)
    side = 7 + 16 + 12
    mask = torch.zeros(1, side, side)
    mask[:, :, 3] = -1e4
    sparse, seen = patched(model, share=0.5), []

    def note(attend: Any, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["mask"].shape)
        return attend(q, *args, **kwargs)

    sparse.model_options["transformer_options"]["optimized_attention_override"] = note
    more = {"attention_mask": mask, "attention_mask_img_shape": (4, 4)}
    _plain_masks(sparse)
    sample(sparse, "kontext", condition(1, given, **more), steps=1)
    assert set(seen) == {(1, 29, 29)}


def _plain_masks(model: Any) -> None:
    """ComfyUI makes a mask as large as text and generation: stands in for a node that covers the references too."""
    own = model.model.extra_conds

    def conds(**kwargs: Any) -> Any:
        mask = kwargs.pop("attention_mask", None)
        out = own(**kwargs)
        if mask is not None:
            out["attention_mask"] = core().conds.CONDRegular(mask)
        return out

    model.model.extra_conds = conds


def test_what_was_read_is_shown(name: str) -> None:
    sparse = patched(patcher(name), "ReCAST flat", 0.5)
    with pytest.raises(SparseRefError, match="a sampling with reference latents must have taken place"):
        TokensRead().show(sparse, {})
    made = {"samples": sample(sparse, name, condition(1, references(name)), steps=4)}
    same, picture, report = TokensRead().show(sparse, made)
    assert same is made
    assert picture.ndim == 4
    assert picture.shape[-1] == 3
    assert 0 <= picture.min() < picture.max() <= 1
    assert report.startswith("Reference tokens kept")
    with pytest.raises(SparseRefError, match="must come from Sparse References"):
        TokensRead().show(patcher(name), made)


def test_what_cannot_be_done_is_said(name: str) -> None:
    positive = condition(1, references(name))
    with pytest.raises(ConfigError, match="more steps, a larger share"):
        sample(patched(patcher(name), "recast", 0.1), name, positive, steps=2)

    class Other(torch.nn.Module):
        pass

    model = patcher(name)
    model.model.diffusion_model = Other()
    with pytest.raises(UnsupportedModelError, match=r"FLUX\.1 Kontext, FLUX\.2 or Qwen-Image-Edit family, got Other"):
        patched(model)


def test_rows_that_another_node_has_changed_are_told() -> None:
    model, positive = patcher("kontext"), condition(1, references("kontext"))
    other = model.clone()
    other.set_model_patch(lambda args: {**args, "img": args["img"][:, :-12]}, "post_input")
    with pytest.raises(LayoutError, match="must have 36 rows, got 24: another node"):
        sample(patched(other), "kontext", positive)


def test_a_model_that_calls_no_post_input_is_refused_at_its_first_call() -> None:
    model = patcher("qwen")
    if _calls_post_input(model):
        pytest.skip("this ComfyUI's Qwen-Image calls post_input patches")
    with pytest.raises(IncompatibleError, match="update ComfyUI"):
        sample(patched(model), "qwen", condition(1, references("qwen")))


def test_registered() -> None:
    assert NODE_CLASS_MAPPINGS["SparseReferences"] is SparseReferences

"""Each trainer's step under a patch: its loss and gradients are those of a step without the dropped tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.classes import full_name
from sparse_ref_attn.models import supported
from sparse_ref_attn.models.codebases import CODEBASES
from tests.models import qwen21
from tests.models.other_pipelines import OTHERS
from tests.training.batches import positions, rows_of
from tests.training.codebases import calls, functions, models
from tests.training.codebases.calls import Step
from tests.training.codebases.models import transformer

DROP = sra.RandomDrop((0.3, 0.7))


@dataclass(frozen=True)
class Trainer:
    """`build` makes the module that is patched, `step` what the trainer calls it with."""

    name: str
    build: Callable[[], nn.Module]
    step: Callable[[], Step]


def function(of: Callable[..., Tensor], dit: nn.Module) -> nn.Module:
    """Stands where the function stood, and is called with the pipeline's models by name."""
    model = sra.FunctionModel(of, dit)
    model.register_forward_pre_hook(lambda module, args, kwargs: (args, {"dit": dit, **kwargs}), with_kwargs=True)
    return model


def flux_function() -> nn.Module:
    return function(models.model_fn_flux_image, transformer("kontext"))


def qwen_function(case: str) -> nn.Module:
    return function(models.model_fn_qwen_image, models.diffsynth_qwen(case))


def fibo() -> nn.Module:
    return OTHERS["fibo"].build().transformer.train().requires_grad_(True)


def with_class(cls: type[nn.Module], case: str) -> Callable[[], nn.Module]:
    return lambda: models.as_class(cls, transformer(case))


TRAINERS = {
    each.name: each
    for each in (
        Trainer("diffusers kontext", lambda: transformer("kontext"), calls.diffusers_kontext),
        Trainer("diffusers flux2", lambda: transformer("flux2"), calls.diffusers_flux2),
        Trainer("diffusers klein", lambda: transformer("klein"), lambda: calls.diffusers_flux2(guidance=False)),
        Trainer("diffusers fibo", fibo, lambda: calls.fibo_edit(hidden=False)),
        Trainer("fibo-edit", fibo, calls.fibo_edit),
        Trainer("ai-toolkit kontext", lambda: transformer("kontext"), calls.ai_toolkit_kontext),
        Trainer("ai-toolkit flux2", models.AiToolkitFlux2, calls.black_forest_flux2),
        Trainer("ai-toolkit qwen", lambda: transformer("qwen_edit_plus"), calls.ai_toolkit_qwen),
        Trainer("ai-toolkit qwen 2511", lambda: transformer("qwen_edit_plus_2511"), calls.ai_toolkit_qwen),
        Trainer("musubi kontext", models.MusubiFlux, calls.musubi_kontext),
        Trainer("musubi flux2", models.MusubiFlux2, calls.black_forest_flux2),
        Trainer("musubi qwen", with_class(models.MusubiQwen, "qwen_edit_plus"), calls.musubi_qwen),
        Trainer("musubi qwen 2511", with_class(models.MusubiQwen, "qwen_edit_plus_2511"), calls.musubi_qwen),
        Trainer("simpletuner kontext", lambda: models.simpletuner_flux2(models.SimpleTunerFlux),
                calls.simpletuner_kontext),
        Trainer("simpletuner flux2", lambda: models.simpletuner_flux2(models.SimpleTunerFlux2),
                calls.simpletuner_flux2),
        Trainer("simpletuner qwen", with_class(models.SimpleTunerQwen, "qwen_edit_plus_2511"),
                lambda: calls.simpletuner_qwen(by_token=True)),
        Trainer("simpletuner qwen 2511", with_class(models.SimpleTunerQwen, "qwen_edit_plus_2511"),
                lambda: calls.simpletuner_qwen(by_token=False)),
        Trainer("diffsynth flux", flux_function, functions.diffsynth_flux),
        Trainer("diffsynth flux2", with_class(models.DiffSynthFlux2, "flux2"), functions.diffsynth_flux2),
        Trainer("diffsynth qwen", lambda: qwen_function("qwen_edit_plus"),
                lambda: functions.diffsynth_qwen_step(False)),
        Trainer("diffsynth qwen, one picture", lambda: qwen_function("qwen_edit_plus"),
                lambda: functions.diffsynth_qwen_step(False, several=False)),
        Trainer("diffsynth qwen 2511", lambda: qwen_function("qwen_edit_plus_2511"),
                lambda: functions.diffsynth_qwen_step(True)),
    )
}  # fmt: skip


def result(model: nn.Module, step: Step, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The loss, and its gradients in every parameter and in the references' latents."""
    model.zero_grad()
    loss = step.loss(model(**kwargs))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"reference {i}": x.grad.clone() for i, x in enumerate(step.references)}
    for reference in step.references:
        reference.grad = None
    return found | {"loss": loss.detach()}


def check(trainer: Trainer, step: Callable[[], Step], drop: sra.RandomDrop = DROP) -> None:
    model = trainer.build()
    dense = result(model, (whole := step()), whole.kwargs)
    handle = sra.patch_for_training(model, drop)
    got = result(model, (patched := step()), patched.kwargs)
    (selection,) = handle.kept
    handle.remove()
    assert selection.sizes in (patched.sizes, (sum(patched.sizes),))  # shifted ones of one frame count as one
    assert 0 < selection.kept < patched.count
    other = step()
    with positions(model, other.kwargs, rows_of(other, selection)):
        wanted = result(model, other, other.by_hand(selection.indices))
    assert got.keys() == wanted.keys()
    assert len(got) > 10
    assert all(bool(value.isfinite().all()) for value in wanted.values())
    assert {key for key, value in wanted.items() if not torch.equal(value, got[key])} == set()
    assert not torch.equal(got["loss"], dense["loss"])
    zeros = sum(int((got[f"reference {i}"] == 0).sum()) for i in range(len(patched.references)))
    channels = sum(x.numel() for x in patched.references) // patched.count
    masked = patched.count if trainer.name == "fibo-edit" else 0  # the last item's context is masked
    dropped = patched.count - selection.kept
    assert zeros >= channels * dropped
    assert masked or zeros == channels * dropped
    again = result(model, (whole := step()), whole.kwargs)
    assert all(torch.equal(value, again[key]) for key, value in dense.items())


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_is_that_without_the_dropped_tokens(name: str) -> None:
    check(TRAINERS[name], TRAINERS[name].step)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("diffsynth flux", lambda: functions.diffsynth_flux(True)),
        ("diffsynth flux2", lambda: functions.diffsynth_flux2(True)),
        ("diffsynth qwen", lambda: functions.diffsynth_qwen_step(False, True)),
        ("diffsynth qwen 2511", lambda: functions.diffsynth_qwen_step(True, True)),
    ],
)
def test_blocks_that_run_again_for_their_gradient(name: str, step: Callable[[], Step]) -> None:
    """DiffSynth-Studio checkpoints each block from its own function."""
    check(TRAINERS[name], step)


def test_the_named_classes_are_those_that_are_served() -> None:
    built = [trainer.build() for name, trainer in TRAINERS.items() if name.split()[0] not in ("diffusers", "fibo-edit")]
    names = {full_name(type(model)) for model in built if not isinstance(model, sra.FunctionModel)}
    run = {f"{m.function.__module__}.{m.function.__qualname__}" for m in built if isinstance(m, sra.FunctionModel)}
    assert {name for name in names if not name.startswith("diffusers.")} | run == set(CODEBASES)
    assert set(CODEBASES) <= set(supported())


def test_diffusers_qwen_image_script_has_no_references(caplog: pytest.LogCaptureFixture) -> None:
    """Its shapes are the target's alone: nothing is dropped, and it is said."""
    model, step = transformer("qwen_edit_plus"), calls.ai_toolkit_qwen()
    shapes = [item[0] for item in step.kwargs["img_shapes"]]
    kwargs = step.kwargs | {"hidden_states": step.kwargs["hidden_states"][:, : step.noisy], "img_shapes": shapes}
    dense = model(**kwargs)[0]
    handle = sra.patch_for_training(model, DROP)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        outputs = [model(**kwargs)[0] for _ in range(8)]
    assert all(torch.equal(out, dense) for out in outputs)
    assert "the first 8 training calls had no reference tokens" in caplog.text
    handle.remove()


def test_diffusers_qwen21_script_is_refused_with_references() -> None:
    """They run among the words of the prompt, in the call that is trained."""
    model, kwargs = qwen21.build().transformer.train(), calls.diffusers_qwen21()
    dense = model(**kwargs)[0]
    handle = sra.patch_for_training(model, DROP)
    with pytest.raises(sra.IncompatibleError, match=r"Qwen-Image-2\.1 reads.*the call of a training script keeps none"):
        model(**kwargs)
    alone = calls.diffusers_qwen21(references=False)
    without = model(**alone)[0]
    handle.remove()
    assert torch.equal(model(**alone)[0], without)
    assert torch.equal(model(**kwargs)[0], dense)
    assert bool(dense.isfinite().all())


@pytest.mark.parametrize("name", ["simpletuner flux2", "simpletuner qwen"])
def test_entries_by_token_share_one_draw(name: str) -> None:
    """Items with counts of their own would be padded, which no entry by token can be."""
    model, step = TRAINERS[name].build(), TRAINERS[name].step()
    sra.patch_for_training(model, sra.RandomDrop((0.1, 0.9), per_sample=True))
    with pytest.raises(sra.IncompatibleError, match=r"an entry for each token cannot be padded, got timestep.*per_sam"):
        model(**step.kwargs)


@pytest.mark.parametrize(
    "more",
    [{"layer_num": 2}, {"context_latents": torch.zeros(1, 4, 4, 4)}, {"edit_rope_interpolation": True}],
    ids=lambda more: next(iter(more)),
)
def test_a_call_of_qwens_function_that_is_not_known_runs_dense(
    more: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, step = qwen_function("qwen_edit_plus"), functions.diffsynth_qwen_step(False)
    dense = model(**step.kwargs, **more)
    sra.patch_for_training(model, DROP)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        assert torch.equal(model(**step.kwargs, **more), dense)
    assert "the layout of a call is not one that the Qwen-Image-Edit (DiffSynth-Studio) adapter knows" in caplog.text


def test_a_prompt_for_parts_of_the_picture_runs_dense() -> None:
    model, step = flux_function(), functions.diffsynth_flux()
    dense = model(**step.kwargs, entity_prompt_emb=[torch.zeros(1)])
    handle = sra.patch_for_training(model, DROP)
    assert torch.equal(model(**step.kwargs, entity_prompt_emb=[torch.zeros(1)]), dense)
    assert not handle.kept


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_qwens_function_patched_for_pictures(zero_cond_t: bool) -> None:
    """A rule that measures no attention drops tokens in each step; all of them leave the generation alone."""
    model = qwen_function("qwen_edit_plus_2511" if zero_cond_t else "qwen_edit_plus")
    step = functions.diffsynth_qwen_step(zero_cond_t)
    with torch.no_grad():
        dense = model(**step.kwargs)
        for keep, kept in ((1.0, 39), (0.25, 10)):
            with sra.patched(model, sra.SparseRef("grid", keep)) as handle:
                handle.begin(steps=1)
                out = model(**step.kwargs)
                assert handle.record.steps[0].kept == kept
                selection = handle.record.steps[0].selection
            assert torch.equal(out, model(**step.by_hand(torch.arange(39) if selection is None else selection.indices)))
            assert torch.equal(out, dense) == (kept == 39)
        with pytest.raises(sra.IncompatibleError, match="attention"):
            sra.patch(model, sra.SparseRef("mass", 0.25))


def test_a_function_that_nobody_knows_is_named() -> None:
    def model_fn(dit: nn.Module, latents: Tensor) -> Tensor:
        return latents

    with pytest.raises(sra.UnsupportedModelError, match=r"got sparse_ref_attn.*FunctionModel of .*model_fn"):
        sra.patch_for_training(sra.FunctionModel(model_fn, nn.Identity()), DROP)


def test_qwens_function_needs_its_model() -> None:
    with pytest.raises(sra.UnsupportedModelError, match="model_fn_qwen_image and its QwenImageDiT"):
        sra.patch(sra.FunctionModel(models.model_fn_qwen_image, nn.Identity()))

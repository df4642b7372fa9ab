"""A transformer patched for training, under a script that knows nothing of it: what it computes, what it leaves."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch

import sparse_ref_attn as sra
from tests.contract.state import GRID, state
from tests.pipelines import CASES
from tests.training.batches import MODELS, Batch, build, gradients, gradients_alone, lora, positions, rows_of, tuned

HALF = sra.RandomDrop((0.3, 0.7))
ONE, TWO = ((6, 4),), ((6, 4), (3, 5))
models = pytest.mark.parametrize("name", MODELS)
models_and_references = pytest.mark.parametrize(
    ("name", "references"), [*((name, TWO) for name in MODELS), ("kontext", ONE), ("qwen_edit_plus_2511", ONE)]
)

EACH = sra.RandomDrop((0.1, 0.9), per_sample=True)


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6 * max(1.0, value.abs().max().item()))


@models_and_references
def test_kept_tokens_train_as_if_alone(name: str, references: tuple) -> None:
    """Prediction and LoRA gradients are those of a run that never saw the dropped tokens."""
    model, batch = tuned(name), Batch(name, references=references)
    handle = sra.patch_for_training(model, HALF)
    got = gradients(model, batch)
    (selection,) = handle.kept
    assert 0 < selection.kept < sum(batch.sizes)
    handle.remove()
    assert len(got) > 4
    assert_close(got, gradients_alone(model, batch, [selection]))
    dense = gradients(model, batch)
    assert any(not torch.allclose(got[key], dense[key], rtol=1e-2) for key in got)


@models_and_references
def test_each_item_trains_as_if_alone(name: str, references: tuple) -> None:
    """Counts of their own: prediction and LoRA gradients of each item run alone with its kept tokens."""
    model, batch = tuned(name), Batch(name, items=3, references=references)
    handle = sra.patch_for_training(model, EACH)
    together = batch.predict(model).detach()
    kept = handle.kept
    assert len({selection.kept for selection in kept}) > 1
    handle.load_state_dict({"draws": 0})
    got = gradients(model, batch)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(kept, handle.kept, strict=True))
    handle.remove()
    with torch.no_grad():
        for i, selection in enumerate(kept):
            rows = rows_of(batch, selection)
            with positions(model, batch.kwargs, rows):
                alone = batch.only(rows, slice(i, i + 1)).predict(model)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert_close(got, gradients_alone(model, batch, kept))


@models
def test_dropped_tokens_of_each_item_get_no_gradient(name: str) -> None:
    model, batch = tuned(name), Batch(name, items=3)
    handle = sra.patch_for_training(model, EACH)
    x = batch.kwargs["hidden_states"].requires_grad_()
    out = model(**batch.kwargs)[0]
    out.square().sum().backward()
    for i, selection in enumerate(handle.kept):
        rows = rows_of(batch, selection)
        dropped = torch.ones(x.shape[1], dtype=torch.bool).index_fill(0, rows, False)
        assert not x.grad[i, dropped].any()
        assert not out[i, dropped].any()
        assert x.grad[i, rows].abs().amax(-1).min() > 0


@models
def test_dropped_tokens_get_no_gradient_and_a_zero_output(name: str) -> None:
    model, batch = tuned(name), Batch(name)
    handle = sra.patch_for_training(model, HALF)
    x = batch.kwargs["hidden_states"].requires_grad_()
    out = model(**batch.kwargs)[0]
    assert out.shape == x.shape
    out.square().sum().backward()
    (selection,) = handle.kept
    rows = rows_of(batch, selection)
    dropped = torch.ones(x.shape[1], dtype=torch.bool).index_fill(0, rows, False)
    assert dropped.sum() == sum(batch.sizes) - selection.kept > 0
    assert not x.grad[:, dropped].any()
    assert not out[:, dropped].any()
    assert x.grad[:, rows].abs().amax(-1).min() > 0


def test_what_is_dropped_is_not_even_read() -> None:
    model, batch = tuned("klein"), Batch("klein")
    handle = sra.patch_for_training(model, HALF)
    batch.predict(model)
    (selection,) = handle.kept
    dropped = torch.ones(sum(batch.sizes), dtype=torch.bool).index_fill(0, selection.indices, False)
    handle.load_state_dict({"draws": 0})
    batch.kwargs["hidden_states"][:, batch.noisy :][:, dropped] = torch.nan
    assert batch.predict(model).isfinite().all()


@models
def test_eval_and_calls_without_references_are_untouched(name: str) -> None:
    model, batch, plain = tuned(name), Batch(name), Batch(name, references=())
    dense, without = batch.predict(model), plain.predict(model)
    handle = sra.patch_for_training(model, HALF)
    assert torch.equal(plain.predict(model), without)
    assert handle.kept == ()
    assert not torch.equal(batch.predict(model), dense)
    model.eval()
    with torch.no_grad():
        assert torch.equal(batch.predict(model), dense)
    assert handle.kept == ()
    model.train()
    assert not torch.equal(batch.predict(model), dense)
    assert torch.equal(batch.predict(copy.deepcopy(model)), dense)  # as for an average of the weights
    assert torch.equal(batch.predict(pickle.loads(pickle.dumps(model))), dense)
    handle.remove()
    assert torch.equal(batch.predict(model), dense)


@models
@pytest.mark.parametrize("per_sample", [False, True])
def test_keep_all_is_bit_identical(name: str, per_sample: bool) -> None:
    model, batch = tuned(name), Batch(name)
    dense = gradients(model, batch)
    sra.patch_for_training(model, sra.RandomDrop(1.0, per_sample=per_sample))
    got = gradients(model, batch)
    assert all(torch.equal(got[key], dense[key]) for key in dense)


@pytest.mark.parametrize(("name", "drop"), list(zip(MODELS, (HALF, EACH, HALF, HALF, EACH), strict=True)), ids=MODELS)
def test_remove_leaves_nothing_behind(name: str, drop: sra.RandomDrop) -> None:
    pipe = CASES[name].build()
    model, batch = lora(pipe.transformer.train()), Batch(name)
    before = state(pipe)
    handle = sra.patch_for_training(model, drop)
    batch.predict(model)
    assert state(pipe) != before
    handle.remove()
    handle.remove()
    assert state(pipe) == before


def test_every_call_is_a_new_draw_and_the_state_goes_on() -> None:
    model, batch = build("kontext"), Batch("kontext")

    def kept(handle: sra.TrainingHandle, calls: int) -> list[list[int]]:
        out = []
        for _ in range(calls):
            batch.predict(model)
            out.append(handle.kept[0].indices.tolist())
        return out

    handle = sra.patch_for_training(model, HALF)
    first = kept(handle, 3)
    saved = pickle.loads(pickle.dumps(handle.state_dict()))
    rest = kept(handle, 3)
    assert len({tuple(each) for each in first + rest}) == 6
    again = sra.patch_for_training(model, HALF)  # replaces the first patch
    assert handle.removed
    assert kept(again, 6) == first + rest
    again.load_state_dict(saved)
    assert kept(again, 3) == rest
    other = sra.patch_for_training(model, sra.RandomDrop((0.3, 0.7), seed=1))
    assert kept(other, 3) != first
    ranked = sra.patch_for_training(model, HALF, rank=1)
    assert kept(ranked, 3) != first


def test_a_patch_for_another_purpose_is_refused() -> None:
    model, batch = build("klein"), Batch("klein")
    inference = sra.patch(model, GRID)
    with pytest.raises(sra.IncompatibleError, match="patched for training alone, got one that is patched for infer"):
        sra.patch_for_training(model, HALF)
    inference.remove()
    training = sra.patch_for_training(model, HALF)
    with pytest.raises(sra.IncompatibleError, match="patched for inference alone, got one that is patched for train"):
        sra.patch(model, GRID)
    batch.predict(model)
    assert training.kept
    sra.patch(copy.deepcopy(model), GRID)  # a copy is free
    training.remove()
    sra.patch(model, GRID).remove()


def test_eval_mode_with_gradients_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = tuned("klein").eval(), Batch("klein")
    with caplog.at_level(logging.INFO, "sparse_ref_attn"):
        sra.patch_for_training(model, HALF)
        for _ in range(2):
            batch.predict(model)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "call transformer.train()" in caplog.messages[1]


@pytest.mark.parametrize("drop", [HALF, EACH])
@pytest.mark.parametrize("name", ["klein", "flux2"])
def test_position_ids_of_every_item(name: str, drop: sra.RandomDrop) -> None:
    """FLUX.2's pipelines and trainers give ids with a batch; the model reads the first item's."""
    model, batch, batched = tuned(name), Batch(name), Batch(name)
    for ids in ("img_ids", "txt_ids"):
        batched.kwargs[ids] = batched.kwargs[ids].expand(2, -1, -1)
    handle = sra.patch_for_training(model, drop)
    first = batch.predict(model)
    handle.load_state_dict({"draws": 0})
    assert torch.equal(batched.predict(model), first)
    assert all(selection.sizes == batch.sizes for selection in handle.kept)


def test_arguments_by_position_and_an_output_object() -> None:
    model, batch = tuned("kontext"), Batch("kontext")
    handle = sra.patch_for_training(model, HALF)
    first = model(**batch.kwargs)[0]
    handle.load_state_dict({"draws": 0})
    kwargs = batch.kwargs | {"return_dict": True}
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    out = model(*(kwargs.pop(name) for name in names), **kwargs)
    assert torch.equal(out.sample, first)


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model, batch = tuned("qwen_edit_plus"), Batch("qwen_edit_plus")
    dense = batch.predict(model)
    for drop in (HALF, EACH):
        handle = sra.patch_for_training(model, drop)
        broken = batch.kwargs | {"encoder_hidden_states": torch.zeros(2, 7, 5)}
        with pytest.raises(RuntimeError):
            model(**broken)
        model.eval()
        assert torch.equal(batch.predict(model), dense)
        model.train()
        handle.load_state_dict({"draws": 0})
        again = batch.predict(model)
        handle.load_state_dict({"draws": 0})
        assert torch.equal(batch.predict(model), again)
        handle.remove()


def test_bad_input() -> None:
    model = build("klein")
    with pytest.raises(sra.ConfigError, match="drop must be a RandomDrop or IsolateReferences, got float"):
        sra.patch_for_training(model, 0.5)
    with pytest.raises(sra.ConfigError, match="rank must be an int of at least 0, got -1"):
        sra.patch_for_training(model, rank=-1)
    with pytest.raises(sra.UnsupportedModelError, match=r"must have an adapter, got torch.*Linear"):
        sra.patch_for_training(torch.nn.Linear(2, 2))
    with pytest.raises(sra.IncompatibleError, match=r"in DataParallel must not be patched.*DistributedDataParallel"):
        sra.patch_for_training(torch.nn.DataParallel(model))
    assert not model._forward_pre_hooks
    handle = sra.patch_for_training(model)
    for bad in ({}, {"draws": -1}, {"draws": 1.5}, {"draws": 0, "more": 1}):
        with pytest.raises(sra.ConfigError, match="'draws': n"):
            handle.load_state_dict(bad)
    with pytest.raises(sra.BudgetError, match="floor must not exceed reference 1's 15 tokens, got 20"):
        Batch("klein").predict((sra.patch_for_training(model, sra.RandomDrop(floor_per_reference=20)), model)[1])

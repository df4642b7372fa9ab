"""References that run by themselves in training: against the same by hand, and under what trainers put around."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.models import named_model
from sparse_ref_attn.types import Reference
from tests.contract.state import GRID, state
from tests.pipelines import CASES
from tests.training.batches import MODELS, TARGETS, Batch, build, gradients, lora, tuned
from tests.training.isolated_by_hand import RowTimes, gradients_by_hand, predicted_by_hand

models = pytest.mark.parametrize("name", MODELS)
ALONE = sra.IsolateReferences()
EACH = sra.IsolateReferences("reference", timestep=0.1, drop=sra.RandomDrop((0.3, 0.7)))
settings = pytest.mark.parametrize("setting", [ALONE, EACH], ids=["all", "each, a share read"])


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            got[key], value, rtol=tolerance, atol=tolerance * max(1e-3, float(value.abs().max()))
        )


def in_float64(name: str) -> tuple[torch.nn.Module, Batch]:
    model, batch = tuned(name).double(), Batch(name)
    batch.kwargs = {
        key: value.double()
        if isinstance(value, Tensor) and value.dtype == torch.float32 and "ids" not in key
        else value
        for key, value in batch.kwargs.items()
    }
    batch.target = batch.target.double()
    batch.loss = lambda model: (batch.predict(model) - batch.target).square().mean()  # type: ignore[method-assign]
    return model, batch


@models
@settings
def test_loss_and_gradients_are_those_by_hand(name: str, setting: sra.IsolateReferences) -> None:
    model, batch = in_float64(name)
    handle = sra.patch_for_training(model, setting)
    handle.load_state_dict({"draws": 1})
    loss = batch.loss(model).detach()
    (second,) = handle.kept
    handle.load_state_dict({"draws": 0})
    got = gradients(model, batch)
    (kept,) = handle.kept
    handle.remove()
    indices = None if setting.drop is None else kept.indices
    assert_close(got, gradients_by_hand(model, batch, setting.per, indices, setting.timestep), 1e-6)
    indices = None if setting.drop is None else second.indices
    by_hand = predicted_by_hand(model, batch, setting.per, indices, setting.timestep)
    torch.testing.assert_close(loss, (by_hand.detach() - batch.target).square().mean(), rtol=1e-9, atol=0)
    dense = gradients(model, batch)
    assert any(not torch.allclose(got[key], dense[key], rtol=1e-2) for key in got)


@pytest.mark.parametrize("per", ["all", "reference"])
def test_one_masked_call_of_a_model_with_a_time_for_each_row(per: str) -> None:
    """Joint attention under a mask by which references see references alone, at their own time: the same loss and
    gradients."""
    torch.manual_seed(0)
    model = RowTimes().double()
    x, text = torch.randn(2, 6 + 4 + 3, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    target = torch.randn(2, 6, 16, dtype=torch.float64)
    times = torch.tensor([0.3, 0.8], dtype=torch.float64)[:, None].repeat(1, 13)
    sees = torch.zeros(18, 18, dtype=torch.bool)
    sees[:11] = True
    for first, last in [(11, 18)] if per == "all" else [(11, 15), (15, 18)]:
        sees[first:last, first:last] = True
    joint = times.clone()
    joint[:, 6:] = 0.05
    loss = (model(x, text, joint, sees)[:, :6] - target).square().mean()
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    adapter = sra.PlainAdapter(
        "x", lambda kwargs: ((0, 6), (Reference(6, 4), Reference(10, 3))), {"times": 1}, text="text",
        attention=["single"] * 2,
        alone=lambda kwargs, layout, rows, time: {
            "x": kwargs["x"][:, rows], "text": kwargs["text"][:, :0],
            "times": torch.full_like(kwargs["times"][:, rows], time),
        },
    )  # fmt: skip
    sra.patch_for_training(model, sra.IsolateReferences(per, 0.05), adapter=adapter)
    out = model(x, text, times)
    assert out.shape == x.shape
    assert not out[:, 6:].any()
    got = (out[:, :6] - target).square().mean()
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=0)
    got.backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, wanted, 1e-9)


@models
def test_rows_of_references_are_zero_and_learn_through_what_is_read(name: str) -> None:
    model, batch = tuned(name), Batch(name)
    handle = sra.patch_for_training(model, sra.IsolateReferences("reference", drop=sra.RandomDrop(0.5)))
    x = batch.kwargs["hidden_states"].requires_grad_()
    out = model(**batch.kwargs)[0]
    assert out.shape == x.shape
    assert not out[:, batch.noisy :].any()
    out.square().sum().backward()
    assert sum(batch.sizes) > handle.kept[0].kept > 0
    assert x.grad[:, batch.noisy :].abs().amax(-1).min() > 0  # unread tokens too, which the read ones look at


@pytest.mark.parametrize(  # `test_loss_and_gradients_are_those_by_hand` has every pair
    ("name", "setting"), list(zip(MODELS, [EACH, EACH, ALONE, ALONE, EACH], strict=True)), ids=MODELS
)
def test_gradient_checkpointing_gives_identical_gradients(name: str, setting: sra.IsolateReferences) -> None:
    """Of two forwards before their backwards: a block that runs again reads the keys of its own call."""
    model, batches = tuned(name), [Batch(name, seed=seed) for seed in range(2)]
    handle = sra.patch_for_training(model, setting)
    plain = gradients(model, *batches)
    model.enable_gradient_checkpointing()
    for turn in ("together", "taken off"):
        handle.load_state_dict({"draws": 0})
        model.zero_grad()
        losses = [batch.loss(model) for batch in batches]
        if turn == "taken off":
            handle.remove()
        for loss in losses:
            loss.backward()
        for key, value in plain.items():
            assert torch.equal(dict(model.named_parameters())[key].grad, value), turn


def test_blocks_checkpointed_with_reentrance_are_refused() -> None:
    model, batch = tuned("klein"), Batch("klein")
    sra.patch_for_training(model, ALONE)
    model.enable_gradient_checkpointing(
        lambda block, *args: torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=True)
    )
    batch.kwargs["hidden_states"].requires_grad_()
    with pytest.raises(sra.IncompatibleError, match=r"without reentrance.*got a block without gradients"):
        batch.predict(model)


@models
def test_eval_mode_and_calls_without_gradients_are_isolated_and_read_everything(name: str) -> None:
    model, batch, plain = tuned(name), Batch(name), Batch(name, references=())
    without, dense = plain.predict(model), batch.predict(model)
    handle = sra.patch_for_training(model, EACH)
    with torch.no_grad():
        predicted = batch.predict(model.eval())
        assert torch.equal(batch.predict(model.train()), predicted)
        torch.testing.assert_close(
            predicted, predicted_by_hand(copy.deepcopy(model), batch, "reference", None, 0.1), rtol=1e-4, atol=1e-5
        )
    assert handle.state_dict() == {"draws": 0}
    assert torch.equal(plain.predict(model), without)
    assert torch.equal(batch.predict(copy.deepcopy(model)), dense)
    handle.remove()
    assert torch.equal(batch.predict(model), dense)


@models
def test_remove_leaves_nothing_behind(name: str) -> None:
    pipe = CASES[name].build()
    model, batch = lora(pipe.transformer.train()), Batch(name)
    model.enable_gradient_checkpointing()
    before = state(pipe)
    handle = sra.patch_for_training(model, EACH)
    batch.loss(model).backward()
    model.zero_grad()
    assert state(pipe) != before
    handle.remove()
    assert state(pipe) == before


@models
def test_mixed_precision(name: str) -> None:
    """Gradients err as those by hand do in the same precision; the truth is in float32."""
    model, batch = tuned(name), Batch(name)
    handle = sra.patch_for_training(model, ALONE)
    full = gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model, batch)
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        by_hand = gradients_by_hand(model, batch, "all")
    truth, got, low = (torch.cat([x[key].flatten() for key in full]) for x in (full, mixed, by_hand))
    assert 0 < (got - truth).norm() <= 1.5 * (low - truth).norm()


@pytest.mark.parametrize(
    ("name", "checkpoints"), [("kontext", False), ("klein", False), ("klein", True), ("qwen_edit_plus", True)]
)
def test_compiled_blocks_run_uncompiled(name: str, checkpoints: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, batch, graphs = tuned(name), Batch(name), []
    handle = sra.patch_for_training(model, EACH)
    plain = gradients(model, batch)
    handle.load_state_dict({"draws": 0})
    if checkpoints:
        model.enable_gradient_checkpointing()
    model.compile_repeated_blocks(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    got = gradients(model, batch)
    assert_close(got, plain, 1e-5)
    assert not graphs
    assert "compiled blocks run uncompiled" in caplog.text


def test_compiled_blocks_run_compiled_again() -> None:
    torch._dynamo.reset()
    model, graphs = tuned("klein", layers=0, single=1), []
    model.compile_repeated_blocks(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    handle = sra.patch_for_training(model, EACH)
    Batch("klein").loss(model).backward()
    assert not graphs
    handle.remove()
    Batch("klein").predict(model)
    assert graphs
    torch._dynamo.reset()


def test_a_peft_model() -> None:
    model, batch = build("kontext"), Batch("kontext")
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    dense = batch.predict(wrapped)
    handle = sra.patch_for_training(wrapped, ALONE)
    first = batch.predict(wrapped)
    assert not torch.equal(first, dense)
    handle.remove()
    torch.testing.assert_close(first, predicted_by_hand(model, batch, "all"), rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.predict(wrapped), dense)


@pytest.mark.parametrize("name", ["kontext", "klein"])
def test_a_mask_of_keys_hides_references_from_themselves_and_from_all(name: str) -> None:
    """A padded reference: the same as a batch whose references end where the mask says."""
    model, batch = tuned(name), Batch(name)
    rows, text = batch.kwargs["hidden_states"].shape[1], batch.kwargs["encoder_hidden_states"].shape[1]
    mask = torch.ones(2, 1, 1, text + rows, dtype=torch.bool)
    mask[..., -batch.sizes[1] :] = False  # the second reference
    kept = torch.arange(rows - batch.sizes[1])
    short = batch.only(kept)
    short.sizes = batch.sizes[:1]
    sra.patch_for_training(model, ALONE)
    wanted = short.predict(model)
    batch.kwargs["joint_attention_kwargs"] = {"attention_mask": mask}
    torch.testing.assert_close(batch.predict(model), wanted, rtol=1e-4, atol=1e-5)
    batch.kwargs["joint_attention_kwargs"] = {"attention_mask": torch.ones(text + rows, text + rows).tril().bool()}
    with pytest.raises(sra.IncompatibleError, match="run by themselves, an attention mask must be of keys"):
        batch.predict(model)


def test_bad_input() -> None:
    model = build("klein")
    with pytest.raises(sra.ConfigError, match="must be a RandomDrop or IsolateReferences, got float"):
        sra.patch_for_training(model, 0.5)
    for bad, said in (
        ({"per": "token"}, 'per must be "all" or "reference"'),
        ({"timestep": 1.5}, r"timestep must lie in \[0, 1\], got 1.5"),
        ({"drop": 0.5}, "drop must be a RandomDrop or None, got 0.5"),
        ({"drop": sra.RandomDrop(per_sample=True)}, "drop must have per_sample=False"),
    ):
        with pytest.raises(sra.ConfigError, match=said):
            sra.IsolateReferences(**bad)
    with pytest.raises(sra.ConfigError, match="must have per and timestep alone"):
        sra.IsolateReferences.from_dict({"par": "all"})
    with pytest.raises(sra.IncompatibleError, match=r"there is nothing to do.*run by themselves already.*Klein-KV"):
        sra.patch_for_training(CASES["klein_kv"].build().transformer, ALONE)
    with pytest.raises(
        sra.IncompatibleError, match=r"where the adapter says how \(alone\), and that of FLUX.3 does not"
    ):
        sra.patch_for_training(named_model("flux3"), ALONE)
    plain = sra.PlainAdapter("x", lambda kwargs: None, alone=lambda kwargs, *rest: kwargs)
    with pytest.raises(sra.IncompatibleError, match=r"plain's attention, which must be known.*attention="):
        sra.patch_for_training(RowTimes(), ALONE, adapter=plain)
    inference = sra.patch(model, GRID)
    with pytest.raises(sra.IncompatibleError, match="patched for training alone, got one that is patched for infer"):
        sra.patch_for_training(model, ALONE)
    inference.remove()
    sra.patch_for_training(model, ALONE)
    model.enable_cache(__import__("diffusers").FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(sra.IncompatibleError, match="go without a step cache"):
        Batch("klein").predict(model)

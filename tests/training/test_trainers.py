"""What trainers put around a transformer: checkpointing, autocast, compilation, PEFT's wrapper, averages of weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import sparse_ref_attn as sra
from tests.contract.test_compile import fresh_compiler  # noqa: F401
from tests.training.batches import MODELS, TARGETS, Batch, build, gradients, gradients_alone, tuned

SHARED = sra.RandomDrop((0.3, 0.7))
OWN = sra.RandomDrop((0.1, 0.9), per_sample=True)
drops = pytest.mark.parametrize("drop", [SHARED, OWN], ids=["shared", "own"])


@pytest.mark.parametrize(  # test_patching has every pair
    ("name", "drop"), list(zip(MODELS, [OWN, SHARED, OWN, OWN, SHARED], strict=True)), ids=MODELS
)
def test_gradient_checkpointing_gives_identical_gradients(name: str, drop: sra.RandomDrop) -> None:
    model, batches = tuned(name), [Batch(name, seed=seed) for seed in range(2)]
    handle = sra.patch_for_training(model, drop)
    plain = gradients(model, *batches)
    handle.load_state_dict({"draws": 0})
    model.enable_gradient_checkpointing()
    again = gradients(model, *batches)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert handle.state_dict() == {"draws": 2}  # blocks that run again draw nothing


def test_two_forwards_before_their_backwards() -> None:
    """A block that runs again in backward takes the rows of its own call, not those of the last one."""
    model, batches = tuned("klein"), [Batch("klein", seed=seed) for seed in range(2)]
    handle = sra.patch_for_training(model, OWN)
    plain = gradients(model, *batches)
    handle.load_state_dict({"draws": 0})
    model.enable_gradient_checkpointing()
    model.zero_grad()
    losses = [batch.loss(model) for batch in batches]
    for loss in losses:
        loss.backward()
    assert all(torch.equal(dict(model.named_parameters())[key].grad, value) for key, value in plain.items())


def test_a_patch_taken_off_before_the_backward() -> None:
    model, batch = tuned("kontext"), Batch("kontext")
    handle = sra.patch_for_training(model, SHARED)
    plain = gradients(model, batch)
    handle.load_state_dict({"draws": 0})
    model.enable_gradient_checkpointing()
    model.zero_grad()
    loss = batch.loss(model)
    handle.remove()
    loss.backward()
    assert all(torch.equal(dict(model.named_parameters())[key].grad, value) for key, value in plain.items())


def test_a_checkpoint_around_the_whole_transformer_is_refused() -> None:
    model, batch = tuned("klein"), Batch("klein")
    sra.patch_for_training(model, SHARED)
    out = checkpoint(lambda: batch.predict(model), use_reentrant=False)
    with pytest.raises(sra.IncompatibleError, match=r"must not be checkpointed as a whole.*enable_gradient_checkp"):
        out.square().sum().backward()


@pytest.mark.parametrize(("name", "drop"), list(zip(MODELS, [SHARED, OWN, OWN, SHARED, OWN], strict=True)), ids=MODELS)
def test_mixed_precision(name: str, drop: sra.RandomDrop) -> None:
    """Gradients err as those of the items alone do in the same precision; the truth is in float32."""
    model, batch = tuned(name), Batch(name)
    handle = sra.patch_for_training(model, drop)
    full = gradients(model, batch)
    handle.load_state_dict({"draws": 0})
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model, batch)
    kept = handle.kept
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        alone = gradients_alone(model, batch, kept)
    assert full.keys() == mixed.keys() == alone.keys()
    truth, got, low = (torch.cat([x[key].flatten() for key in full]) for x in (full, mixed, alone))
    assert 0 < (got - truth).norm() <= 1.5 * (low - truth).norm()
    if drop is SHARED:
        assert torch.equal(got, low)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(  # the blocks of flux2 are Klein's, and those of Qwen-Image-Edit-Plus are its 2511 form's
    ("name", "first", "dynamic"),
    [("kontext", "compile", None), ("klein", "patch", True), ("qwen_edit_plus_2511", "patch", None)],
)
def test_compiled_blocks(name: str, first: str, dynamic: bool | None) -> None:
    """Lengths that change at every step compile once more, for any length, and then never again."""
    batches = [Batch(name, seed=seed) for seed in range(6)]
    depth = {"layers": int("qwen" in name), "single": 1}
    eager = tuned(name, **depth)
    sra.patch_for_training(eager, SHARED)
    wanted = gradients(eager, *batches)
    model, graphs = tuned(name, **depth), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(len(batch_of))
        return graph

    batch_of: list[int] = []
    if first == "compile":
        model.compile_repeated_blocks(fullgraph=True, dynamic=dynamic, backend=backend)
    handle = sra.patch_for_training(model, SHARED)
    if first == "patch":
        model.compile_repeated_blocks(fullgraph=True, dynamic=dynamic, backend=backend)
    model.zero_grad()
    counts = set()
    for batch in batches:
        batch_of.append(0)
        batch.loss(model).backward()
        counts.add(handle.kept[0].kept)
    got = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5 * max(1.0, float(value.abs().max())))
    assert len(counts) > 3
    assert graphs
    assert max(graphs) <= 2
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_and_counts_of_their_own_are_refused() -> None:
    model = tuned("klein")
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    sra.patch_for_training(model, OWN)
    with pytest.raises(sra.IncompatibleError, match=r"blocks that are not compiled.*per_sample=False"):
        Batch("klein").predict(model)


def test_context_parallelism_and_counts_of_their_own_are_refused() -> None:
    model = tuned("klein")
    sra.patch_for_training(model, OWN)
    model._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(sra.IncompatibleError, match=r"got context parallelism.*per_sample=False"):
        Batch("klein").predict(model)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_as_a_whole() -> None:
    """Refused before the patch, as its hooks would never run; after it, the compiler steps around them."""
    for compiled in (torch.compile(build("klein"), backend="eager"), build("klein")):
        if not hasattr(compiled, "_orig_mod"):
            compiled.compile(backend="eager")
        with pytest.raises(sra.IncompatibleError, match=r"compiled as a whole.*compile_repeated_blocks"):
            sra.patch_for_training(compiled, SHARED)
    eager, model = (tuned("klein", layers=0, single=1) for _ in range(2))
    batch = Batch("klein")
    sra.patch_for_training(eager, SHARED)
    handle = sra.patch_for_training(model, SHARED)
    model.compile(backend="eager")
    torch.testing.assert_close(batch.predict(model), batch.predict(eager), rtol=1e-4, atol=1e-5)
    assert handle.kept


@drops
def test_a_peft_model(drop: sra.RandomDrop) -> None:
    """The transformer inside the wrapper is patched, whoever calls it."""
    model, batch = build("kontext"), Batch("kontext")
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    dense = batch.predict(wrapped)
    handle = sra.patch_for_training(wrapped, drop)
    first = batch.predict(wrapped)
    assert handle.kept
    assert not torch.equal(first, dense)
    handle.load_state_dict({"draws": 0})
    assert torch.equal(batch.predict(model), first)
    handle.remove()
    assert torch.equal(batch.predict(wrapped), dense)


@drops
def test_an_average_of_the_weights_is_clean(drop: sra.RandomDrop) -> None:
    from torch.optim.swa_utils import AveragedModel

    model, batch = tuned("qwen_edit_plus"), Batch("qwen_edit_plus")
    dense = batch.predict(model)
    handle = sra.patch_for_training(model, drop)
    average = AveragedModel(model)
    average.update_parameters(model)
    batch.predict(model)
    kept = handle.kept
    assert torch.equal(batch.predict(average), dense)
    assert handle.kept is kept
    assert torch.equal(batch.predict(copy.deepcopy(model)), dense)
    handle.remove()
    assert torch.equal(batch.predict(average), dense)


def test_an_adapter_that_cannot_tell_items_apart_is_refused() -> None:
    class MyDiT(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model, adapter = MyDiT(), sra.PlainAdapter("x", lambda kwargs: None)
    with pytest.raises(sra.IncompatibleError, match="to run calls together, the attention of MyDiT must"):
        sra.patch_for_training(model, OWN, adapter=adapter)
    assert not model._forward_pre_hooks
    sra.patch_for_training(model, SHARED, adapter=adapter).remove()

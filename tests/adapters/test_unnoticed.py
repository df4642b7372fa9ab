"""A patch that does nothing says so: once, in the log, in the report and when it is taken off."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.types import Reference
from tests.latents import CASES
from tests.training.batches import Batch, build

GRID = sra.SparseRef("grid", 0.5)


def grid(frame: int, height: int, width: int, left: int = 0) -> torch.Tensor:
    ids = torch.cartesian_prod(torch.tensor([frame]), torch.arange(height), torch.arange(width))
    ids[:, 2] += left
    return ids


def said(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.message for record in caplog.records)


def around(transformer: Any) -> None:
    """From now on the transformer's own call is its class's forward: no hook of it ever fires."""
    own = type(transformer).forward
    transformer.__class__ = type("Around", (type(transformer),), {"__call__": own})


PAST = "without its own call"


@pytest.mark.parametrize("name", ["kontext", "klein", "klein_kv", "qwen_edit"])
def test_a_transformer_whose_forward_is_never_called(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Codebases that run a model through a function of its parts."""
    pipe = CASES[name].build()
    handle = sra.patch(pipe, GRID)
    around(pipe.transformer)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        CASES[name].call(pipe)
        assert said(caplog, PAST) == 1  # nobody asked
        with pytest.raises(sra.SparseRefError, match=rf"must have taken place; .*{PAST}"):
            handle.summary()
        CASES[name].call(pipe)
        handle.remove()
        handle.remove()
    assert said(caplog, PAST) == 1


def test_the_report_of_an_earlier_run_is_not_shown_for_one_that_went_past(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["kontext"]
    pipe = case.build()
    handle = sra.patch(pipe, GRID)
    case.call(pipe)
    handle.summary()
    published = type(pipe.transformer)
    around(pipe.transformer)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        case.call(pipe)
    assert said(caplog, PAST) == 1
    for ask in (handle.summary, handle.flops, lambda: handle.record, lambda: handle.ranking):
        with pytest.raises(sra.SparseRefError, match=PAST):
            ask()
    pipe.transformer.__class__ = published
    case.call(pipe, steps=2)
    assert len(handle.record.steps) == 2
    assert not handle.notes


def test_a_bare_transformer_whose_forward_is_never_called(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = build("klein").eval(), Batch("klein")
    handle = sra.patch(model, GRID)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"), torch.no_grad():
        model.forward(**batch.kwargs)
        assert said(caplog, PAST) == 1
        with pytest.raises(sra.SparseRefError, match=PAST):
            handle.summary()
        model(**batch.kwargs)
        handle.summary()
        handle.remove()
    assert said(caplog, PAST) == 1


def test_a_wrapper_that_goes_past_the_hooks(caplog: pytest.LogCaptureFixture) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.config, self.dtype, self.device = model, model.config, model.dtype, model.device

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model.forward(*args, **kwargs)

    pipe = CASES["kontext"].build()
    handle = sra.patch(pipe, GRID)
    pipe.transformer = Wrapper(pipe.transformer)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        CASES["kontext"].call(pipe)
    assert said(caplog, PAST) == 1
    with pytest.raises(sra.SparseRefError, match=PAST):
        handle.summary()


def test_one_step_past_the_patch_is_noted_in_the_report_of_its_run() -> None:
    case = CASES["kontext"]
    pipe = case.build()
    handle = sra.patch(pipe, GRID)
    published, past = type(pipe.transformer), []

    def turn(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            around(pipe.transformer)
            past.append(step)
        else:
            pipe.transformer.__class__ = published
        return kwargs

    case.call(pipe, callback=turn)
    (note,) = handle.notes
    assert PAST in note
    assert [step.index for step in handle.record.steps] == [0, 2]


def test_a_run_that_nobody_saw_is_told_beside_the_earlier_report(caplog: pytest.LogCaptureFixture) -> None:
    """What the scheduler alone tells of may have been no run at all."""
    case = CASES["kontext"]
    pipe = case.build()
    handle = sra.patch(pipe, GRID)
    case.call(pipe)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        handle.summary()
        assert not caplog.records
        for _ in range(2):
            pipe.scheduler.set_timesteps(3, mu=1.0)
            assert "this may be the report of an earlier run: the pipeline's scheduler was set" in handle.summary()
    assert said(caplog, "did not go through the transformer's own call") == 1


def put(pipe: Any, transformer: Any) -> None:
    pipe.transformer = transformer


def register(pipe: Any, transformer: Any) -> None:
    pipe.register_modules(transformer=transformer)


@pytest.mark.parametrize("replace", [put, register])
@pytest.mark.parametrize("runs_before", [0, 1])
def test_a_transformer_that_was_replaced(replace: Any, runs_before: int, caplog: pytest.LogCaptureFixture) -> None:
    pipe = CASES["klein"].build()
    handle = sra.patch(pipe, GRID)
    for _ in range(runs_before):
        CASES["klein"].call(pipe)
    replace(pipe, copy.deepcopy(pipe.transformer))
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        CASES["klein"].call(pipe)
        assert said(caplog, "pipe.transformer is another one") == 1
        with pytest.raises(sra.SparseRefError, match=r"pipe\.transformer is another one .*patch again"):
            handle.summary()
        handle.remove()
    assert said(caplog, "pipe.transformer is another one") == 1


def test_a_replaced_transformer_and_scheduler_are_told_beside_the_report(caplog: pytest.LogCaptureFixture) -> None:
    pipe = CASES["klein"].build()
    handle = sra.patch(pipe, GRID)
    CASES["klein"].call(pipe)
    pipe.transformer = copy.deepcopy(pipe.transformer)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    CASES["klein"].call(pipe)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        assert "this may be the report of an earlier run: pipe.transformer is another one" in handle.summary()
        handle.remove()
    assert said(caplog, "pipe.transformer is another one") == 1


def test_a_new_pipeline_of_the_old_ones_components() -> None:
    pipe = CASES["klein"].build()
    handle = sra.patch(pipe, GRID)
    other = type(pipe)(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer)})
    CASES["klein"].call(other)
    with pytest.raises(sra.SparseRefError, match="scheduler was set 1 times since"):
        handle.summary()


def test_a_second_transformer_beside_the_patched_one(caplog: pytest.LogCaptureFixture) -> None:
    pipe = CASES["klein"].build()
    pipe.transformer_2 = copy.deepcopy(pipe.transformer)
    sra.patch(pipe, GRID)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        CASES["klein"].call(pipe)
        CASES["klein"].call(pipe)
    assert said(caplog, "pipe.transformer_2 is a transformer beside the one that is patched, and runs dense") == 1
    caplog.clear()
    sra.patch(pipe, GRID)
    sra.patch(pipe.transformer_2, GRID)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        CASES["klein"].call(pipe)
    assert not caplog.records


def test_a_patch_that_replaces_another_hears_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    pipe = CASES["klein"].build()
    sra.patch(pipe, GRID)
    CASES["klein"].call(pipe)
    handle = sra.patch(pipe, GRID)
    assert vars(pipe.scheduler)["set_timesteps"].earlier is None  # nothing stays of the replaced one
    pipe.transformer = copy.deepcopy(pipe.transformer)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        CASES["klein"].call(pipe)
    assert said(caplog, "pipe.transformer is another one") == 1
    handle.remove()
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_a_patch_that_never_had_references_says_so_when_it_is_taken_off(caplog: pytest.LogCaptureFixture) -> None:
    """References stacked under the generation, in its own frame, look like a taller picture."""
    pipe = CASES["kontext"].build()
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        with sra.patched(pipe, GRID):
            CASES["kontext"].call(pipe, references=0)
        assert said(caplog, "never dropped a token: the calls since the patch had no reference tokens") == 1
        with sra.patched(pipe.transformer, GRID):
            pass
    assert said(caplog, "never dropped a token: the transformer was not called") == 1


@pytest.mark.parametrize("rank", [2, 4])
def test_an_unknown_layout_after_a_run_has_no_report(rank: int) -> None:
    """The earlier report is not this run's."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return x

    adapter = sra.PlainAdapter(tokens="x", find=lambda kwargs: ((0, 4), (Reference(4, 4, (2, 2)),)))
    model = Model()
    handle = sra.patch(model, GRID, adapter=adapter)
    handle.begin(1)
    handle.step(0)
    model(x=torch.randn(1, 8, 2), timestep=torch.ones(1))
    handle.summary()
    model(x=torch.randn((8, 2) if rank == 2 else (1, 2, 4, 2)), timestep=torch.ones(1))
    with pytest.raises(sra.SparseRefError, match=r"layout of its calls was not known: 'x' is missing or not"):
        handle.summary()


def test_a_model_of_somebodys_own_is_watched_by_the_layer_after_its_blocks(caplog: pytest.LogCaptureFixture) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = torch.nn.Linear(2, 2), torch.nn.ModuleList([torch.nn.Linear(2, 2)])
            self.last = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.last(self.blocks[0](self.first(x)))

    adapter = sra.PlainAdapter(tokens="x", find=lambda kwargs: ((0, 4), (Reference(4, 4, (2, 2)),)))
    model, x = Model(), torch.randn(1, 8, 2)
    sra.patch(model, GRID, adapter=adapter)
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        model.blocks[0](model.first(x))
        model(x, torch.ones(1))
        assert not said(caplog, PAST)
        model.last(model.blocks[0](model.first(x)))
        assert said(caplog, PAST) == 1


def test_copies_do_not_watch_and_nothing_stays(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = build("klein").eval(), Batch("klein")
    handle = sra.patch(model, GRID)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    handle.remove()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"), torch.no_grad():
        for each in (model, *copies):
            each.forward(**batch.kwargs)
    assert not caplog.records
    assert not model.proj_out._forward_pre_hooks


def test_a_graph_of_the_last_layer_stays_whole() -> None:
    model = build("klein").eval()
    sra.patch(model, GRID)
    compiled = torch.compile(lambda x: model.proj_out(x), fullgraph=True, backend="eager")
    x = torch.randn(1, 4, model.proj_out.in_features)
    assert torch.equal(compiled(x), model.proj_out(x))


def test_a_compiled_wrapper_is_no_replacement(caplog: pytest.LogCaptureFixture) -> None:
    pipe = CASES["klein"].build()
    handle = sra.patch(pipe, GRID)
    pipe.transformer = torch.nn.Sequential(pipe.transformer)  # any module that holds it
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        handle.remove()
    assert said(caplog, "another one") == 0


def test_calls_without_references_and_unknown_layouts_are_told_apart() -> None:
    case = CASES["kontext"]
    pipe = case.build()
    handle = sra.patch(pipe, GRID)
    case.call(pipe, references=0)
    with pytest.raises(sra.SparseRefError, match="the calls since the patch had no reference tokens"):
        handle.summary()
    seen: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    case.call(pipe, references=0, steps=1)
    hook.remove()
    beside = torch.cat([grid(0, 8, 8), grid(0, 8, 12, left=4)])  # on the generation's own columns
    x = torch.randn(1, len(beside), seen["hidden_states"].shape[2])
    with torch.no_grad():
        pipe.transformer(**{**seen, "hidden_states": x, "img_ids": beside})
    with pytest.raises(sra.SparseRefError, match="the layout of its calls was not known: 160 rows"):
        handle.summary()

"""A model that a function runs: patched as the module that its call is, and the same run as that of the model."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ref_attn as sra
from tests.adapters.test_plain import SIDE, TOKENS, build, example, given  # noqa: F401  (example is a fixture)
from tests.adapters.test_plain_apart import CONFIGS, run


def model_fn(dit: nn.Module, latents: Tensor, text: Tensor, timestep: Tensor, image_ids: Tensor, **more: Any) -> Tensor:
    """Cuts latents (B, CHANNELS, SIDE, SIDE) into tokens, runs the layers, and never calls the model."""
    tokens, ids = latents.flatten(2).transpose(1, 2), image_ids[0]
    if more.get("ref_latents") is not None:
        tokens, ids = torch.cat([tokens, more["ref_latents"]], 1), torch.cat([ids, more["ref_ids"][0]])
    out: Tensor = type(dit).forward(dit, tokens, ids, text, timestep)
    if more.get("ref_latents") is not None:
        out = out[:, : -more["ref_latents"].shape[1]]  # as DiffSynth does: nothing would be left of an empty one
    return out.transpose(1, 2).unflatten(2, latents.shape[2:])


def find(kwargs: dict[str, Any]) -> Any:
    if kwargs.get("ref_ids") is None:
        return (0, TOKENS), ()
    return sra.references_from_ids(torch.cat([kwargs["image_ids"], kwargs["ref_ids"]], 1), TOKENS)


ADAPTER = sra.PlainAdapter(
    tokens="image_ids", references="ref_latents", reference_rows={"ref_ids": 1}, text="text", find=find,
    attention=["single"] * 2, conditional=lambda kwargs: slice(0, 1), positions="ref_ids",
    grid=lambda kwargs: (SIDE, SIDE), name="function",
)  # fmt: skip


def split(call: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own call as the function's arguments."""
    tokens = call["tokens"]
    ids = call["ids"].expand(len(tokens), -1, -1)
    own = {"ref_latents": tokens[:, TOKENS:], "ref_ids": ids[:, TOKENS:], "image_ids": ids[:, :TOKENS]}
    latents = tokens[:, :TOKENS].transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return {"latents": latents, "text": call["text"], "timestep": call["timestep"], **own}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_run_of_the_model(example: ModuleType, name: str) -> None:  # noqa: F811
    dit, images, text = build(example)
    call = given(example, images, text)
    joined = example.adapter(2)
    joined._grid = lambda kwargs: (SIDE, SIDE)
    want, record = run(dit, call, CONFIGS[name], joined)
    model = sra.FunctionModel(model_fn, dit)
    outputs = []
    with sra.patched(model, CONFIGS[name], adapter=ADAPTER) as handle:
        handle.begin(steps=len(want))
        for step in range(len(want)):
            handle.step(step)
            outputs.append(model(dit, **split(call)).flatten(2).transpose(1, 2))
        assert [(s.kind, s.kept) for s in handle.record.steps] == [(s.kind, s.kept) for s in record.steps]
    assert torch.equal(torch.stack(outputs), want)
    dense = model_fn(dit, **split(call))
    assert torch.equal(model(dit, **split(call)), dense)
    assert not torch.equal(outputs[-1], dense.flatten(2).transpose(1, 2))


def test_arguments_by_place_are_bound_by_name(example: ModuleType) -> None:  # noqa: F811
    dit, images, text = build(example)
    call = split(given(example, images, text))
    model = sra.FunctionModel(model_fn, dit)
    placed = [call.pop(name) for name in ("latents", "text", "timestep", "image_ids")]
    with sra.patched(model, sra.SparseRef("grid", 0.3), adapter=ADAPTER) as handle:
        handle.begin(steps=1)
        model(dit, *placed, **call)
        assert handle.record.steps[0].kept == 2 * 19


def test_the_function_called_past_its_module_is_noticed(example: ModuleType) -> None:  # noqa: F811
    dit, images, text = build(example)
    call = split(given(example, images, text))
    model = sra.FunctionModel(model_fn, dit)
    with sra.patched(model, sra.SparseRef("grid", 0.3), adapter=ADAPTER) as handle:
        handle.begin(steps=1)
        model_fn(dit, **call)
        with pytest.raises(sra.SparseRefError):
            handle.summary()


def test_what_is_no_function_of_a_model_is_refused() -> None:
    with pytest.raises(sra.ConfigError, match="each argument of the function must have a name"):
        sra.FunctionModel(lambda *args: args, nn.Identity())
    with pytest.raises(sra.ConfigError, match="a function and the module whose layers it runs"):
        sra.FunctionModel(model_fn, model_fn)  # type: ignore[arg-type]

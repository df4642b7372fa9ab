"""Every argument of every supported pipeline's call: does it reach the transformer, and is it honoured there?"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.types import TokenLayout
from tests.adapters.pipeline_calls import ARGUMENTS, CALLS, PIPELINES, base_arguments
from tests.adapters.test_dropping import KEEP, ROUNDING, error, noise, scores
from tests.adapters.witnesses import LATENT, Call, HiddenKeys, best, witnessed
from tests.pipelines import small_pictures
from tests.training.test_patching import EACH, HALF

FAMILIES = ("kontext", "flux2", "klein_kv", "klein", "qwen", "longcat")
NOISE = sra.SparseRef(sra.FromFunction(noise), KEEP)
SHALLOW = {"layers": 1, "single": 1}
"""A block of each kind; of Qwen, which has one kind, `shallow` builds two."""
IP_KEYS = {4: torch.ones(4, dtype=torch.bool)}
"""Attention to an IP-Adapter's tokens, of which none is hidden."""


def shallow(name: str) -> Any:
    return PIPELINES[name].build(**({} if name.startswith("qwen") else SHALLOW))


@cache
def pipeline(name: str) -> Any:
    """One for all tests that leave it as it is."""
    return shallow(name)


@cache
def parameters(name: str) -> list[str]:
    """Names of the arguments of a case's pipeline."""
    return [p for p in inspect.signature(type(pipeline(name)).__call__).parameters if p != "self"]


ALL = [(name, argument) for name in PIPELINES for argument in parameters(name)]
CELLS = [(name, argument) for name, argument in ALL if argument in ARGUMENTS and name not in ARGUMENTS[argument].fails]
"""(case, argument) of every argument that a case can be given."""
REACHING = [cell for cell in CELLS if not cell[0].startswith(ARGUMENTS[cell[1]].inert or ("-",))]


def by_family(cells: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of each family of pipelines, which call one transformer alike, the first that has the argument."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for name, argument in cells:
        family = next(f for f in FAMILIES if name.startswith(f))
        found.setdefault((family, argument), (name, argument))
    return list(found.values())


def test_the_table_has_every_argument_and_no_other() -> None:
    assert {argument for _, argument in ALL} == set(ARGUMENTS)


def given(name: str, argument: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and what is given to it with another value of the argument."""
    case, entry = PIPELINES[name], ARGUMENTS[argument]
    pipe = shallow(name) if entry.prepare else pipeline(name)
    if entry.prepare:
        entry.prepare(pipe)
    known = set(parameters(name))
    with torch.no_grad(), small_pictures():
        own = {key: value for key, value in entry.make(case, pipe).items() if key in known}
        assert argument in own
        return pipe, base_arguments(case, pipe) | own


def run(pipe: Any, arguments: dict[str, Any]) -> tuple[list[Call], np.ndarray]:
    """Calls of the transformer, without their attention, and what the pipeline gives: latents instead of "np"."""
    if arguments["output_type"] == "np":
        arguments = arguments | LATENT
    with witnessed(pipe.transformer) as calls, small_pictures():
        output = pipe(**arguments)
    for call in calls:
        call.attention.clear()
    return calls, picture_of(output)


@cache
def plain_calls(name: str, dropping: bool) -> list[Call]:
    pipe = pipeline(name)
    arguments = base_arguments(PIPELINES[name], pipe)
    return dropped(pipe, arguments)[0] if dropping else run(pipe, arguments)[0]


def dropped(pipe: Any, arguments: dict[str, Any]) -> tuple[list[Call], np.ndarray, TokenLayout]:
    """A run that drops rows, and where the tokens were."""
    with sra.patched(pipe, NOISE) as handle:
        return *run(pipe, arguments), handle.record.layout


@cache
def dropped_with(name: str, argument: str) -> tuple[Any, list[Call], np.ndarray, TokenLayout]:
    """The pipeline, and its run that drops rows with another value of the argument."""
    pipe, arguments = given(name, argument)
    return pipe, *dropped(pipe, arguments)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b) if a.shape == b.shape else False
    if isinstance(a, dict) or isinstance(b, dict):
        return bool(a) == bool(b)
    return a is b or (not isinstance(a, Tensor) and type(a) is type(b) and a == b)


def changes(calls: list[Call], plain: list[Call]) -> set[str]:
    """What differs in the first call that differs; `CALLS` where their number does."""
    if len(calls) != len(plain):
        return {CALLS}
    for one, other in zip(calls, plain, strict=True):
        names = {*one.given, *other.given} - {"kv_cache"}
        differing = {n for n in names if not same(one.given.get(n), other.given.get(n))}
        if differing:
            return differing
    return set()


FIRST = by_family([cell for cell in REACHING if cell[0] != "klein_kv"])


@pytest.mark.parametrize(("name", "argument"), [cell for cell in ALL if cell[1] in ARGUMENTS])
@torch.no_grad()
def test_what_reaches_the_transformer_is_what_the_table_says(name: str, argument: str) -> None:
    """And of each family's first, it is honoured where rows are dropped and by training on these calls."""
    entry = ARGUMENTS[argument]
    if (name, argument) in FIRST:
        pipe, calls, _, layout = dropped_with(name, argument)
        changed = changes(calls, plain_calls(name, True))
        assert changed
        assert changed <= entry.changes
        honoured_where_rows_are_dropped(pipe.transformer, calls if CALLS in entry.changes else calls[-1:], layout)
        try:
            for drop in draws(name, argument):
                honoured_in_training(pipe.transformer.train(), calls[-1], drop, entry.refused)
        finally:
            pipe.transformer.eval()
        return
    pipe, arguments = given(name, argument)
    if name in entry.fails:
        with pytest.raises((ValueError, TypeError), match=r"not enough values to unpack|NoneType. has no len"):
            run(pipe, arguments)
        return
    changed = changes(run(pipe, arguments)[0], plain_calls(name, False))
    assert changed <= entry.changes
    assert bool(changed) == ((name, argument) in REACHING)


def draws(name: str, argument: str) -> tuple[Any, ...]:
    """One draw for all items of a batch and one for each: in turn over the families that have an argument, and over
    the arguments."""
    having = [case for case, other in FIRST if other == argument]
    turn = list(ARGUMENTS).index(argument) + having.index(name)
    return (HALF, EACH) if len(having) == 1 else ((HALF, EACH)[turn % 2],)


def visible(call: Call, layout: TokenLayout, kept: Tensor) -> dict[int, Tensor]:
    """Keys that a call's attention sees, by their number."""
    text, generation = torch.ones(call.text).bool(), torch.ones(layout.generation[1]).bool()
    first = layout.generation[0] > 0
    seen = torch.cat([text, *([kept, generation] if first else [generation, kept])])
    return {len(seen): seen, **({len(kept): kept} if first else {}), **IP_KEYS}


def honoured_where_rows_are_dropped(model: Any, calls: list[Call], layout: TokenLayout) -> None:
    """Every call is the dense one of the same arguments whose attention does not see the dropped keys."""
    kept = best(scores(layout.sizes), layout.sizes, KEEP)
    rows = torch.cat([torch.ones(layout.generation[1]).bool(), kept])
    for call in calls:
        assert call.reached["hidden_states"].shape[1] == int(rows.sum())
        with HiddenKeys(visible(call, layout, kept)):
            wanted = model(**call.given)[0]
        assert error(call.sample[:, rows], wanted[:, rows]) < ROUNDING


EXECUTIONS = ("tokens", "cache", "both")
ROWWISE = ("attention_kwargs", "num_images_per_prompt", "num_inference_steps")
"""What of a call's rows are read as the execution stores them: these meet each of them, the others one in turn."""
STORED = [
    (argument, execute)
    for i, argument in enumerate(argument for name, argument in REACHING if name == "klein_kv")
    for execute in (EXECUTIONS if argument in ROWWISE else (EXECUTIONS[i % 3],))
]


@pytest.mark.parametrize(("argument", "execute"), STORED)
@torch.no_grad()
def test_honoured_where_reference_keys_are_stored(argument: str, execute: str) -> None:
    pipe, arguments = given("klein_kv", argument)
    handle = sra.patch(pipe, replace(NOISE, execute=execute))
    extract, *later = run(pipe, arguments)[0]
    layout = handle.record.layout
    handle.remove()
    kept = best(scores(layout.sizes), layout.sizes, KEEP)
    stored = torch.ones(len(kept)).bool() if execute == "cache" else kept
    with HiddenKeys(visible(extract, layout, stored)):
        wanted, cache = pipe.transformer(**extract.given)
    assert error(extract.sample, wanted) < ROUNDING
    assert later
    for call in later:
        with HiddenKeys(visible(call, layout, kept)):
            wanted = pipe.transformer(**call.given | {"kv_cache": cache})[0]
        assert error(call.sample, wanted) < ROUNDING


def picture_of(output: Any) -> np.ndarray:
    """The picture in whatever a pipeline's call returns, as numbers."""
    images = output[0] if isinstance(output, tuple) else output.images
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


def alone(pipe: Any, own: dict[str, Any]) -> np.ndarray:
    """The picture of an item of a batch, whose generator is left as it was."""
    generator_state = own["generator"].get_state()
    with sra.patched(pipe, NOISE), small_pictures():
        picture = picture_of(pipe(**own))
    own["generator"].set_state(generator_state)
    return picture


@cache
def picture_without(name: str, output_type: str) -> np.ndarray:
    """Of an item of a batch that is given no other argument."""
    pipe = pipeline(name)
    return alone(pipe, base_arguments(PIPELINES[name], pipe, 5) | {"output_type": output_type})


def in_batches(cells: list[tuple[str, str]], most: int = 8) -> list[tuple[str, list[str]]]:
    """A pipeline and the arguments of a batch's items; what prepares its pipeline has a batch to itself, and what asks
    for pictures of another kind."""
    single = {name for name in ARGUMENTS if ARGUMENTS[name].prepare or name == "output_type"}
    batches = [(name, [argument]) for name, argument in cells if argument in single]
    for case in PIPELINES:
        own = [argument for name, argument in cells if name == case and argument not in single]
        batches += [(case, own[i : i + most]) for i in range(0, len(own), most)]
    return batches


@pytest.mark.parametrize(
    ("name", "names"), in_batches(by_family(CELLS)), ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_honoured_in_a_batch(name: str, names: list[str]) -> None:
    """Beside an item without any, each is what it is alone; or the batch says why it cannot be."""
    entry, made = ARGUMENTS[names[0]], [given(name, argument) for argument in names]
    pipe = made[0][0]
    items = [base_arguments(PIPELINES[name], pipe, 5), *(arguments for _, arguments in made)]
    if names != ["output_type"]:  # nobody looks at the pictures
        items = [own | (LATENT if own["output_type"] == "np" else {}) for own in items]
    if names[0].endswith("attention_kwargs"):  # a LoRA has one scale in one call
        items[0][names[0]] = {"scale": items[1][names[0]]["scale"]}
    wanted = []
    if entry.prepare and not entry.refused:
        wanted = [alone(pipe, own) for own in items]
    elif not entry.refused:
        wanted = [picture_without(name, items[0]["output_type"])] + [
            dropped_with(name, argument)[2] if (name, argument) in FIRST else alone(pipe, own)
            for argument, own in zip(names, items[1:], strict=True)
        ]
    each = [{k: v for k, v in own.items() if k not in ("prompt", "image", "generator")} for own in items]
    images = [own["image"] if isinstance(own["image"], list) else [own["image"]] for own in items]
    call = {"config": NOISE, "generators": [own["generator"] for own in items], "each": each}
    with small_pictures():
        if entry.refused:
            with pytest.raises(sra.IncompatibleError, match=entry.refused):
                sra.batch(pipe, [own["prompt"] for own in items], images, **call)
            return
        done = sra.batch(pipe, [own["prompt"] for own in items], images, **call)
    for output, picture, which in zip(done.outputs, wanted, ["none", *names], strict=True):
        scale = max(1.0, float(abs(picture).max()))
        atol = 1.01 if scale > 200 else 3e-5 * scale
        np.testing.assert_allclose(picture_of(output), picture, rtol=0, atol=atol, err_msg=which)


def honoured_in_training(model: Any, call: Call, drop: Any, refused: str) -> None:
    """A pipeline's own call as a training batch of two, whose items have one draw or one each."""
    adapter = adapter_for(model)
    if drop is EACH and refused:
        with pytest.raises(sra.IncompatibleError, match=refused):
            sra.patch_for_training(model, drop)
        return
    layout = adapter.layout(call.given, adapter.find(call.given))
    items = 1 if refused or call.given["hidden_states"].shape[0] > 1 else 2
    double = {
        key: value * items if isinstance(value, list) else torch.cat([value] * items)
        for key, value in call.given.items()
        if key in adapter.per_item and value is not None
    }
    handle = sra.patch_for_training(model, drop)
    with torch.enable_grad():  # validation, without gradients, drops nothing
        got, kept = model(**call.given | double)[0].detach(), handle.kept
    handle.remove()
    assert len(kept) == (1 if drop is HALF else len(got))
    for i, selection in enumerate(kept):
        hidden = torch.zeros(layout.reference_tokens).bool().index_fill(0, selection.indices, True)
        rows = torch.cat([torch.ones(layout.generation[1]).bool(), hidden])
        with HiddenKeys(visible(call, layout, hidden)):
            wanted = model(**call.given)[0]
        if items == 2:
            wanted = wanted.expand(2, -1, -1)
        at = slice(None) if drop is HALF else slice(i, i + 1)
        assert error(got[at, rows], wanted[at, rows]) < ROUNDING

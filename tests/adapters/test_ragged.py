"""Items of different lengths in one call of each family's transformer: outputs and gradients of the items alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_ref_attn.adapters.collate import sample_of
from sparse_ref_attn.adapters.shortened import Shortened
from sparse_ref_attn.errors import IncompatibleError, LayoutError
from sparse_ref_attn.models import adapter_for
from sparse_ref_attn.patching.execution.ragged import Item, Ragged
from sparse_ref_attn.types import Reference, TokenLayout
from tests.latents import CASES

TRANSFORMERS = ("kontext", "flux2", "klein", "qwen_edit_plus", "qwen_edit_plus_2511")
OUTPUTS = ((2, 3), (3, 4), (2, 2))  # grids
REFERENCES = (((4, 2),), ((2, 2), (3, 5), (1, 3)), ())
TEXTS = (5, 2, 7)
TIMES = (0.9, 0.5, 0.5)


def positions(frame: int, grid: tuple[int, int], axes: int) -> Tensor:
    ids = torch.cartesian_prod(torch.tensor([frame]), torch.arange(grid[0]), torch.arange(grid[1]))
    return torch.nn.functional.pad(ids, (0, axes - 3)).float()


def call(transformer: Any, output: tuple, references: tuple, text: int, time: float, batch: int = 1) -> dict[str, Any]:
    """Arguments of one call, by what the class takes."""
    config, grids = transformer.config, (output, *references)
    rows = sum(h * w for h, w in grids)
    kwargs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, rows, config.in_channels),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim),
        "timestep": torch.full((batch,), time),
        "return_dict": False,
    }
    if "img_shapes" in type(transformer).forward.__wrapped__.__code__.co_varnames:
        return kwargs | {"img_shapes": [[(1, h, w) for h, w in grids]] * batch, "encoder_hidden_states_mask": None}
    axes = len(config.axes_dims_rope)
    frames = [0, *(10 * (i + 1) for i in range(len(references)))] if axes == 4 else [0] + [1] * len(references)
    kwargs |= {
        "img_ids": torch.cat([positions(f, g, axes) for f, g in zip(frames, grids, strict=True)]),
        "txt_ids": positions(0, (1, text), axes) if axes == 4 else torch.zeros(text, 3),
    }
    if config.guidance_embeds:
        kwargs["guidance"] = torch.full((batch,), 2.5)
    if axes == 3:
        kwargs["pooled_projections"] = torch.randn(batch, config.pooled_projection_dim)
    return kwargs


def transformer_of(name: str) -> Any:
    return CASES[name].build(layers=2, single=1).transformer


def items_for(transformer: Any, times: tuple[float, ...] = TIMES) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [call(transformer, *of) for of in zip(OUTPUTS, REFERENCES, TEXTS, times, strict=True)]


def install(transformer: Any) -> Ragged:
    ragged = Ragged(transformer, adapter_for(transformer))
    ragged.install()
    return ragged


def gradients(transformer: Any, losses: list[Tensor]) -> dict[str, Tensor]:
    transformer.zero_grad()
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert expected
    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=2e-5 * float(want.abs().max()), msg=name)


@pytest.mark.parametrize("times", [TIMES, (0.5, 0.5, 0.5)])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_outputs_are_those_of_the_items_alone(name: str, times: tuple[float, ...]) -> None:
    transformer = transformer_of(name)
    items = items_for(transformer, times)
    with torch.no_grad():
        alone = [transformer(**kwargs)[0] for kwargs in items]
        ragged = install(transformer)
        with ragged.joined([Item(kwargs) for kwargs in items]) as joined:
            got = joined.outputs(transformer(**joined.kwargs))
        ragged.remove()
        again = [transformer(**kwargs)[0] for kwargs in items]
    for (mine,), want, after in zip(got, alone, again, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(after, want)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_gradients_are_those_of_the_items_alone(name: str, checkpointing: bool) -> None:
    transformer = transformer_of(name).requires_grad_(True).train()
    items = items_for(transformer)
    alone = gradients(transformer, [transformer(**kwargs)[0].square().mean() for kwargs in items])
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    ragged = install(transformer)
    with ragged.joined([Item(kwargs) for kwargs in items]) as joined:
        got = joined.samples(transformer(**joined.kwargs))
    joint = gradients(transformer, [sample.square().mean() for sample in got])
    ragged.remove()
    assert_same_gradients(joint, alone)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_batch_with_kept_rows_of_each_item(name: str, checkpointing: bool) -> None:
    """`shortened`, which training uses: one batched call, its own kept rows and timestep for each item."""
    transformer = transformer_of(name).requires_grad_(True).train()
    torch.manual_seed(2)
    kwargs = call(transformer, (2, 3), ((4, 2), (2, 2)), 5, 0.0, batch=3)
    kwargs["timestep"] = torch.tensor([0.2, 0.7, 0.7])
    layout = TokenLayout(18, 5, (0, 6), (Reference(6, 8, (4, 2)), Reference(14, 4, (2, 2))))
    kept = [torch.tensor([*range(6), 7, 9, 17]), torch.arange(18), torch.arange(6)]
    adapter = adapter_for(transformer)
    alone, short = [], None
    off = adapter.hooks(transformer, lambda: short)
    for part, rows in zip(adapter.items(kwargs), kept, strict=True):
        short = Shortened(part, rows, layout.rows)
        output = transformer(**adapter.drop(part, layout, rows))
        alone.append(adapter.restore(output, rows, layout.rows)[0])
    for remove in off:
        remove()
    losses = [row.square().mean() for row in alone]
    expected = gradients(transformer, losses)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    ragged = install(transformer)
    with ragged.shortened(kwargs, layout, kept) as one:
        out = one.restore(transformer(**one.kwargs))[0]
    got = gradients(transformer, [row.square().mean() for row in out])
    ragged.remove()
    torch.testing.assert_close(out, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert out.shape[:2] == (3, 18)
    assert not out[2, 6:].any()
    assert not out[0, [6, 8]].any()
    assert_same_gradients(got, expected)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_all_rows_kept_is_the_batched_call(name: str) -> None:
    transformer = transformer_of(name)
    torch.manual_seed(2)
    kwargs = call(transformer, (2, 3), ((4, 2),), 5, 0.6, batch=2)
    layout = TokenLayout(14, 5, (0, 6), (Reference(6, 8, (4, 2)),))
    ragged = install(transformer)
    with torch.no_grad():
        want = transformer(**kwargs)[0]
        with ragged.shortened(kwargs, layout, [torch.arange(14)] * 2) as one:
            got = one.restore(transformer(**one.kwargs))[0]
    ragged.remove()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_masked_text_is_not_attended_to() -> None:
    transformer = transformer_of("qwen_edit_plus")
    items = items_for(transformer)
    items[0]["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 0, 1, 0]])
    ragged = install(transformer)
    seen = []
    with torch.no_grad():
        alone = [transformer(**kwargs)[0] for kwargs in items]
        with ragged.joined([Item(kwargs) for kwargs in items], tap=lambda *of: seen.append(of)) as joined:
            got = joined.samples(transformer(**joined.kwargs))
    ragged.remove()
    for mine, want in zip(got, alone, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)
    masks = [mask for item, site, q, k, v, mask, lse in seen if item == 0]
    assert len(masks) == 2
    assert masks[0].flatten().tolist()[:6] == [True, True, False, True, False, True]


@pytest.mark.parametrize("name", ["kontext", "klein"])
def test_the_tap_sees_each_item_as_it_would_alone(name: str) -> None:
    from sparse_ref_attn.hooks.diffusers import tapped_attention

    transformer = transformer_of(name)
    items, adapter = items_for(transformer), adapter_for(transformer)
    alone, joint = [], []
    with torch.no_grad():
        for i, kwargs in enumerate(items):
            tap = lambda site, q, k, v, mask, i=i: alone.append((i, site, q, k, v))  # noqa: E731
            with tapped_attention(adapter.sites(transformer), tap):
                transformer(**kwargs)
        ragged = install(transformer)
        with ragged.joined([Item(kwargs) for kwargs in items], tap=lambda *of: joint.append(of[:5])) as joined:
            transformer(**joined.kwargs)
        ragged.remove()
    assert len(joint) == len(alone) == 3 * 3
    for want, got in zip(alone, sorted(joint, key=lambda of: of[:2]), strict=True):
        assert want[:2] == got[:2]
        for x, y in zip(want[2:], got[2:], strict=True):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_items_that_see_each_other_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails where attention forgets whose row is whose."""
    from sparse_ref_attn.patching.execution import ragged_rows as module

    transformer = transformer_of("klein")
    items = items_for(transformer)
    true = module.gather_attention
    monkeypatch.setattr(module, "gather_attention", lambda q, k, v, **cu: true(q, k, v, return_lse=True))
    ragged = install(transformer)
    with torch.no_grad():
        with ragged.joined([Item(kwargs) for kwargs in items]) as joined:
            got = joined.samples(transformer(**joined.kwargs))
        ragged.remove()
        want = transformer(**items[0])[0]
    assert (got[0] - want).abs().max() > 1e-2


def test_other_calls_and_copies_are_untouched() -> None:
    transformer = transformer_of("kontext")
    items = items_for(transformer)
    with torch.no_grad():
        want = transformer(**items[0])[0]
        ragged = install(transformer)
        assert torch.equal(transformer(**items[0])[0], want)
        assert torch.equal(copy.deepcopy(transformer)(**items[0])[0], want)
        ragged.remove()
        ragged.remove()
    attention = [m for m in transformer.modules() if hasattr(m, "processor")]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in attention)
    assert all("_attention_backend" not in vars(m.processor) for m in attention)


def test_a_failing_call_leaves_the_backend_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_ref_attn.patching.execution import ragged_rows as module

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    transformer = transformer_of("kontext")
    items = items_for(transformer)
    ragged = install(transformer)
    with monkeypatch.context() as patch, ragged.joined([Item(kwargs) for kwargs in items]) as joined:
        patch.setattr(module, "gather_attention", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            transformer(**joined.kwargs)
    assert all("_attention_backend" not in vars(m.processor) for m in transformer.modules() if hasattr(m, "processor"))
    with torch.no_grad():
        want = transformer(**items[1])[0]
        with ragged.joined([Item(kwargs) for kwargs in items]) as joined:
            got = joined.samples(transformer(**joined.kwargs))
    torch.testing.assert_close(got[1], want, rtol=1e-5, atol=1e-5)
    ragged.remove()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"joint_attention_kwargs": {"scale": 0.5}},
            "must have the same joint_attention_kwargs, got None, {'scale': 0.5}",
        ),
        ({"return_dict": True}, "must have the same return_dict, got False, True"),
        ({"guidance": None}, "must all have guidance or none of them, got both"),
        ({"controlnet_block_samples": [torch.ones(1)]}, "controlnet_block_samples cannot be padded"),
    ],
)
def test_calls_that_cannot_run_together_are_refused(change: dict[str, Any], words: str) -> None:
    transformer = transformer_of("kontext")
    items = items_for(transformer)
    items[1] |= change
    ragged = install(transformer)
    with pytest.raises(IncompatibleError) as refused, ragged.joined([Item(kwargs) for kwargs in items]):
        pass
    assert words in str(refused.value)
    ragged.remove()


def test_rows_must_be_given_for_each_item() -> None:
    transformer = transformer_of("kontext")
    kwargs = call(transformer, (2, 3), (), 5, 0.6, batch=2)
    ragged = install(transformer)
    with (
        pytest.raises(LayoutError, match="each of the batch's 2 items, got 1"),
        ragged.shortened(kwargs, TokenLayout(6, 5, (0, 6), ()), [torch.arange(6)]),
    ):
        pass
    ragged.remove()


def test_an_output_object_stays_one() -> None:
    transformer = transformer_of("qwen_edit")
    items = [kwargs | {"return_dict": True} for kwargs in items_for(transformer)]
    ragged = install(transformer)
    with torch.no_grad(), ragged.joined([Item(kwargs) for kwargs in items]) as joined:
        outputs = joined.outputs(transformer(**joined.kwargs))
        want = transformer(**items[1])  # another call in between is not mistaken for the joined one
    ragged.remove()
    assert {type(output) for output in outputs} == {type(want)}
    torch.testing.assert_close(sample_of(outputs[1]), want.sample, rtol=1e-5, atol=1e-5)

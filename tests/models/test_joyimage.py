"""JoyImage-Edit and Edit-Plus: tokens dropped, against the model called on the kept ones by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_ref_attn as sra
from sparse_ref_attn.errors import IncompatibleError
from sparse_ref_attn.hooks.instance_method import InstanceMethod
from tests.adapters.test_dropping import noise, scores
from tests.adapters.witnesses import Call, best, witnessed
from tests.models.other_pipelines import OTHERS, Other

KEEP = 0.3
PLUS, EDIT = OTHERS["joyimage edit plus"], OTHERS["joyimage edit"]
both = pytest.mark.parametrize("other", [PLUS, EDIT], ids=lambda other: other.name)


def sparse_calls(other: Other, **more: Any) -> tuple[list[Call], Tensor]:
    """Calls of a sparse run, and which of the rows were kept, (rows,) bool."""
    pipe = other.build()
    handle = sra.patch(pipe, sra.SparseRef(sra.FromFunction(noise), KEEP))
    with witnessed(pipe.transformer) as calls:
        other.call(pipe, steps=2, **more)
    sizes = handle.record.layout.sizes
    handle.remove()
    return calls, torch.cat([torch.ones(other.generation).bool(), best(scores(sizes), sizes, KEEP)])


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_edit_plus_is_the_model_called_on_the_kept_patches_bit_for_bit(guided: bool) -> None:
    """By hand: each kept patch is a picture of one token, put where it stood by the range that its position gives."""
    calls, rows = sparse_calls(PLUS, **(PLUS.guided if guided else {}))
    fresh = PLUS.build().transformer
    (_, *grids) = [(t, h, w) for t, h, w in calls[0].given["shape_list"][0]]
    own = fresh._get_rotary_pos_embed_for_range
    places = [(0, y, x) for y in range(8) for x in range(8)]
    places += [(i + 1, y, x) for i, (_, h, w) in enumerate(grids) for y in range(h) for x in range(w)]
    kept = [places[row] for row in rows.nonzero().flatten()]
    asked = iter(kept * len(calls) * 2)

    def one(start: Any, stop: Any) -> Any:
        t, y, x = next(asked)
        return own((t, y, x), (t + 1, y + 1, x + 1))

    fresh._get_rotary_pos_embed_for_range = one
    for call in calls:
        given = dict(call.given)
        batch = given["hidden_states"].shape[0]
        given |= {"hidden_states": given["hidden_states"][:, rows], "shape_list": [[(1, 1, 1)] * len(kept)] * batch}
        asked = iter(kept * batch)
        assert torch.equal(call.sample[:, rows], fresh(**given)[0])
        assert not call.sample[:, ~rows].any()


@torch.no_grad()
def test_edit_is_the_model_called_on_a_row_of_the_kept_patches_bit_for_bit() -> None:
    calls, rows = sparse_calls(EDIT, **EDIT.guided)
    assert len(calls) == 4
    fresh = EDIT.build().transformer
    own = fresh.get_rotary_pos_embed
    (cos, sin), _ = own([2, 8, 12])
    fresh.get_rotary_pos_embed = lambda vis_rope_size, txt_rope_size: ((cos[rows], sin[rows]), None)
    for call in calls:
        reference, generation = call.given["hidden_states"].unbind(1)
        pictures = torch.cat([generation, reference], 2)  # (B, C, 2, H, W)
        patches = torch.nn.functional.unfold(pictures.transpose(1, 2).flatten(0, 1), 2, stride=2)
        patches = patches.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)[:, :, rows]  # (B, C * 4, K)
        line = patches.unflatten(1, (4, 2, 2)).permute(0, 1, 2, 4, 3).flatten(3, 4)[:, :, None]
        got = fresh(**call.given | {"hidden_states": line})[0]
        wanted = torch.nn.functional.unfold(got[:, :, 0], 2, stride=2)
        made = torch.cat([call.sample[:, 1], call.sample[:, 0]], 2)
        made = torch.nn.functional.unfold(made.transpose(1, 2).flatten(0, 1), 2, stride=2)
        made = made.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)
        assert torch.equal(made[:, :, rows], wanted)
        assert not made[:, :, ~rows].any()


@both
def test_a_call_without_references_is_itself(other: Other) -> None:
    pipe = other.build()
    none = {name: None for name in ("image", "images") if name in other.arguments(3)}
    dense = other.call(pipe, **none)
    with sra.patched(pipe, sra.SparseRef("mass", KEEP)):
        assert (other.call(pipe, **none) == dense).all()


@both
@torch.no_grad()
def test_a_copy_of_a_patched_model_is_as_published_and_so_is_the_model_after(other: Other) -> None:
    pipe = other.build()
    with witnessed(pipe.transformer) as calls:
        other.call(pipe, steps=1)
    want = calls[0].sample
    handle = sra.patch(pipe.transformer, sra.SparseRef("grid", KEEP))
    twin = copy.deepcopy(pipe.transformer)
    assert torch.equal(twin(**calls[0].given)[0], want)
    assert not torch.equal(pipe.transformer(**calls[0].given)[0], want)
    handle.remove()
    assert torch.equal(pipe.transformer(**calls[0].given)[0], want)
    assert not any(isinstance(value, InstanceMethod) for value in vars(pipe.transformer).values())


@torch.no_grad()
def test_samples_of_other_sizes_run_dense() -> None:
    """Padding stands behind the smaller one, so that no layout is that of both."""
    pipe = PLUS.build()
    with witnessed(pipe.transformer) as calls:
        PLUS.call(pipe, steps=1)
    given = calls[0].given
    shapes = given["shape_list"][0]
    both = {name: torch.cat([x, x]) for name, x in given.items() if isinstance(x, Tensor)}
    both |= {"shape_list": [shapes, shapes[:2]], "return_dict": False}
    want = pipe.transformer(**both)[0]
    with sra.patched(pipe.transformer, sra.SparseRef("grid", KEEP)):
        assert torch.equal(pipe.transformer(**both)[0], want)


@both
def test_gradients_of_dropped_tokens_are_zero_under_training(other: Other) -> None:
    pipe = other.build()
    with witnessed(pipe.transformer) as calls:
        other.call(pipe, steps=1)
    x = calls[0].given["hidden_states"].detach().requires_grad_()
    pipe.transformer.train()
    drop = sra.patch_for_training(pipe.transformer, sra.RandomDrop((0.25, 0.25)))
    out = pipe.transformer(**calls[0].given | {"hidden_states": x})[0]
    other.generated(out, other.generation).square().sum().backward()
    drop.remove()
    rows = x.grad.flatten(2).abs().sum(2)[0] if other is PLUS else None
    if rows is not None:
        assert int((rows == 0).sum()) == len(rows) - other.generation - drop.kept[0].kept
    else:
        frames = torch.nn.functional.unfold(x.grad[:, 0, :, 0], 2, stride=2).abs().sum(1)[0]
        assert int((frames > 0).sum()) == drop.kept[0].kept


@both
def test_items_with_draws_of_their_own_are_refused(other: Other) -> None:
    pipe = other.build()
    with pytest.raises(IncompatibleError, match="to run calls together, the attention of JoyImage"):
        sra.patch_for_training(pipe.transformer, sra.RandomDrop((0.25, 0.5), per_sample=True))

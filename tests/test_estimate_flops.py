"""Estimates of whole runs against FlopCounterMode, at real size on meta."""

from __future__ import annotations

import contextlib
from functools import cache
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

import sparse_ref_attn as sra
from sparse_ref_attn.adapters.depth import DepthCut
from sparse_ref_attn.cost import StepTokens, step_flops
from sparse_ref_attn.estimation import estimate
from sparse_ref_attn.models import adapter_for, named_model
from sparse_ref_attn.ops.attention_mass.reference import attention_mass_reference
from sparse_ref_attn.patching.execution.depth import truncate
from sparse_ref_attn.types import Reference, TokenLayout

ONE = [(1024, 1024)]
published = cache(named_model)


def empty(*shape):
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


def call(name, model, text, generation, references):
    rows = generation + references
    inputs = {
        "hidden_states": empty(1, rows, model.config.in_channels),
        "encoder_hidden_states": empty(1, text, getattr(model.config, "joint_attention_dim", 4096)),
        "timestep": empty(1),
    }
    if name == "kontext":
        extra = {"pooled_projections": empty(1, 768), "guidance": empty(1)}
        model(**inputs, **extra, img_ids=empty(rows, 3), txt_ids=empty(text, 3))
    elif name == "fibo-edit":
        layers = [empty(1, text, 2048)] * (model.config.num_layers + model.config.num_single_layers)
        model(**inputs, text_encoder_layers=layers, img_ids=empty(rows, 3), txt_ids=empty(text, 3))
    elif name == "joyimage-edit-plus":
        patches = empty(1, rows, model.config.in_channels, *model.config.patch_size)
        shapes = [[(1, 64, generation // 64), (1, 1, references)]]
        model(patches, inputs["timestep"], inputs["encoder_hidden_states"], None, shapes)
    elif name == "z-image-omni":
        pictures = [empty(16, 1, 2, 2 * tokens) for tokens in (references, generation)]
        words = [empty(text // 2, 2560)] * 2
        model([pictures], inputs["timestep"], [words], siglip_feats=[None], image_noise_mask=[[0, 1]])
    elif name == "ltx-2":  # without sound, whose work is not counted
        text_and_sound = {
            "encoder_hidden_states": empty(1, text, 3840),
            "audio_encoder_hidden_states": empty(1, 0, 3840),
        }
        places = {"video_coords": empty(1, 3, rows, 2), "audio_coords": empty(1, 1, 0, 2), "use_cross_timestep": True}
        times = {"timestep": empty(1, rows), "audio_timestep": empty(1), "sigma": empty(1), "audio_sigma": empty(1)}
        model(inputs["hidden_states"], empty(1, 0, 128), **text_and_sound, **places, **times)
    elif name == "longcat-image-edit":
        model(**inputs, img_ids=empty(rows, 3), txt_ids=empty(text, 3))
    elif name == "flux3":
        own = {"image_cond_hidden_states": inputs["hidden_states"][:, generation:]} if references else {}
        own |= {"image_cond_ids": empty(references, 4)} if references else {}
        inputs["hidden_states"] = inputs["hidden_states"][:, :generation]
        model(**inputs, **own, img_ids=empty(generation, 4), txt_ids=empty(text, 4))
    elif name.startswith("qwen"):
        with torch.device("meta"):
            model(**inputs, img_shapes=[[(1, 64, generation // 64), (1, 1, references)]])
    else:
        model(**inputs, guidance=None, img_ids=empty(rows, 4), txt_ids=empty(text, 4))


def counted(function, *args):
    """FLOPs. On meta a block of a class does the same for the same shapes, so each is run once for them and added."""
    outputs, extra = {}, []
    with torch.no_grad(), FlopCounterMode(display=False) as counter, contextlib.ExitStack() as stack:
        models = [x for x in args if isinstance(x, torch.nn.Module)]
        kinds = {type(block.module) for model in models for block in adapter_for(model).blocks(model)}

        def once(forward):
            def run(block, *given, **named):
                leaves, form = tree_flatten((given, named))
                key = type(block), str(form), *(x.shape if isinstance(x, torch.Tensor) else x for x in leaves)
                if key in outputs:
                    extra.append(outputs[key][1])
                else:
                    before = counter.get_total_flops()
                    outputs[key] = forward(block, *given, **named), counter.get_total_flops() - before
                return outputs[key][0]

            return run

        for kind in kinds:
            stack.enter_context(mock.patch.object(kind, "forward", once(kind.forward)))
        function(*args)
    return counter.get_total_flops() + sum(extra)


@pytest.mark.parametrize(
    "name",
    [
        "kontext", "klein-9b", "qwen-image-edit-2511", "longcat-image-edit", "flux3", "fibo-edit",
        "joyimage-edit-plus", "z-image-omni", "ltx-2",
    ],
)  # fmt: skip
def test_a_whole_run_is_within_one_percent_of_the_flop_counter(name):
    model = published(name)
    e = estimate(model, "recast", references=[(1024, 1024), (768, 1024)], steps=2, text_tokens=300)
    steps = [counted(call, name, model, 300, 4096, kept) for kept in e.tokens]
    assert e.kinds == ("profile", "sparse")
    assert e.tokens[0] == sum(e.references) == 4096 + 3072
    shape = adapter_for(model).shape(model)
    heads, channels = shape.heads, shape.head_dim
    scored = {"kontext": 38, "klein-9b": 24, "qwen-image-edit-2511": 40, "longcat-image-edit": 20, "flux3": 28}
    scored |= {"joyimage-edit-plus": 27, "z-image-omni": 30, "ltx-2": 32}
    scored = scored.get(name, 38)
    q, k = empty(1, 4096, heads, channels), empty(1, 300 + 4096 + e.tokens[0], heads, channels)
    # the model's own attention gives the LSE: the references' own keys alone are multiplied
    scoring = scored * counted(attention_mass_reference, q, k[:, 4396:], (0, e.tokens[0]), 1.0)
    assert e.scoring.total == pytest.approx(scoring, rel=0.01)
    assert e.dense.total == pytest.approx(2 * steps[0], rel=0.01)
    assert e.sparse.total == pytest.approx(sum(steps) + scoring, rel=0.01)


def call_by_depth(name, model, kept, first):
    """One call whose references leave at block `first`."""
    adapter = adapter_for(model)
    layout = TokenLayout(2 * 4096, 300, (0, 4096), (Reference(4096, 4096, (64, 64)),))
    cut = DepthCut(layout, lambda: torch.arange(4096 + kept, device="meta"))

    def shorten(kind, block, args, kwargs):
        assert cut.arrive()
        return adapter.drop_in_block(kind, adapter.bind(block, args, kwargs), cut)

    with truncate(adapter.blocks(model)[first:], shorten):
        call(name, model, 300, 4096, 4096)


@pytest.mark.parametrize(
    ("name", "first"), [("kontext", 30), ("klein-9b", 3), ("qwen-image-edit-2511", 20), ("flux3", 9)]
)
def test_leaving_by_depth_is_within_one_percent_of_the_flop_counter(name, first):
    model = published(name)
    given = {"references": ONE, "steps": 3, "text_tokens": 300}
    dense, by_depth = counted(call, name, model, 300, 4096, 4096), counted(call_by_depth, name, model, 1024, first)
    at_input = counted(call, name, model, 300, 4096, 1024)
    assert at_input < by_depth < dense
    layout = TokenLayout(2 * 4096, 300, (0, 4096), (Reference(4096, 4096),))
    exact = step_flops(adapter_for(model).shape(model), StepTokens.of(layout, 1024, first))
    assert exact.total == by_depth
    e = estimate(model, **given, config=sra.SparseRef("grid", 0.25, from_block=first))
    assert (e.kinds, e.from_block) == (("sparse",) * 3, (first,) * 3)
    assert e.sparse.total == pytest.approx(3 * by_depth, rel=0.01)
    assert e.dense.total == pytest.approx(3 * dense, rel=0.01)
    blocks = e.blocks
    assert e.mean_tokens == pytest.approx((first * 4096 + (blocks - first) * 1024) / blocks)
    flying = estimate(model, **given, config=sra.SparseRef("mass", 0.25, profile="in_flight", profile_blocks=first))
    assert flying.kinds == ("in_flight", "sparse", "sparse")
    heads, channels = model.config.num_attention_heads, model.config.attention_head_dim
    scored = 11 if name == "kontext" else first  # its first 11 single blocks
    q, k = empty(1, 4096, heads, channels), empty(1, 300 + 8192, heads, channels)
    scoring = scored * counted(attention_mass_reference, q, k[:, 4396:], (0, 4096), 1.0)
    assert flying.scoring.total == pytest.approx(scoring, rel=0.01)
    assert flying.sparse.total == pytest.approx(by_depth + 2 * at_input + scoring, rel=0.01)

"""The shape that costs are made of, read off a module."""

from __future__ import annotations

import copy
from dataclasses import replace

import diffusers
import pytest
import torch
from torch import nn

from sparse_ref_attn.cost import ModelShape
from sparse_ref_attn.errors import ConfigError, UnsupportedModelError
from tests.test_cost import BF16, FLUX_STREAMS, kontext


def test_a_layer_that_no_expression_matches_is_named():
    model = copy.deepcopy(kontext(num_layers=1, num_single_layers=1))
    model.side_branch = nn.Linear(4, 4, device="meta")
    with pytest.raises(UnsupportedModelError, match="1 that match none: side_branch"):
        ModelShape.from_module(model, FLUX_STREAMS)


def test_lora_layers_count_where_their_hosts_do():
    from peft import LoraConfig

    model = copy.deepcopy(kontext(num_layers=1, num_single_layers=1))
    plain = ModelShape.from_module(model, FLUX_STREAMS)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "add_q_proj"]))
    adapted = ModelShape.from_module(model, FLUX_STREAMS)
    grown = 4 * (3072 + 3072)
    assert (adapted.image - plain.image, adapted.text - plain.text, adapted.joint - plain.joint) == (grown,) * 3
    assert adapted.attention_layers == plain.attention_layers == 2


def test_compiled_blocks_and_fused_projections_change_nothing():
    model = copy.deepcopy(kontext(num_layers=1, num_single_layers=1))
    plain = ModelShape.from_module(model, FLUX_STREAMS)
    model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn.to_qkv.out_features == 3 * 3072
    model.transformer_blocks[0] = torch.compile(model.transformer_blocks[0])
    fused = ModelShape.from_module(model, FLUX_STREAMS)
    assert (fused.image, fused.text, fused.joint) == (plain.image, plain.text, plain.joint)


def test_int8_weights_keep_their_flops_and_halve_their_bytes():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    tiny = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 2}
    model = diffusers.FluxTransformer2DModel(guidance_embeds=True, joint_attention_dim=64, **tiny).to(BF16)
    plain = ModelShape.from_module(model, FLUX_STREAMS)
    quantize_(model, Int8WeightOnlyConfig())
    quantised = ModelShape.from_module(model, FLUX_STREAMS)
    assert replace(quantised, parameter_bytes=0) == replace(plain, parameter_bytes=0)
    assert quantised.parameter_bytes / plain.parameter_bytes == pytest.approx(0.5, abs=0.02)


def test_a_linear_look_alike_counts():
    class Packed(nn.Module):
        """A quantised layer that is no nn.Linear, as several libraries have."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 4
            self.scale = nn.Parameter(torch.ones(4, dtype=torch.float16))

    shape = ModelShape.from_module(
        nn.Sequential(Packed(), nn.Linear(4, 2)), {"0": "joint", "1": "item"}, attention_layers=1, heads=2, head_dim=4
    )
    assert (shape.joint, shape.item, shape.widest) == (32, 8, 12)


def test_what_the_config_does_not_say_must_be_given():
    layer = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="num_layers"):
        ModelShape.from_module(layer, {"0": "image"})
    with pytest.raises(ConfigError, match="stream"):
        ModelShape.from_module(layer, {"0": "picture"}, attention_layers=1, heads=1, head_dim=4)
    with pytest.raises(ConfigError, match="output_rows"):
        ModelShape.from_module(layer, {"0": "image"}, attention_layers=1, heads=1, head_dim=4, output_rows="some")
    with pytest.raises(ConfigError, match="floating-point"):
        ModelShape.from_module(nn.Sequential(), {}, attention_layers=1, heads=1, head_dim=4)

"""Costs against FlopCounterMode and live bytes, on the meta device at the models' real sizes."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVCache,
    Flux2KVParallelSelfAttnProcessor,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sparse_ref_attn.cost import (
    Flops,
    ModelShape,
    StepTokens,
    bound_seconds,
    reference_kv_bytes,
    run_flops,
    scoring_flops,
    step_flops,
    step_memory,
)
from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.models.flux import FluxAdapter
from sparse_ref_attn.models.flux2 import Flux2Adapter
from sparse_ref_attn.models.qwen import QwenImageAdapter
from sparse_ref_attn.types import Reference, TokenLayout

FLUX_STREAMS, FLUX2_STREAMS, QWEN_STREAMS = FluxAdapter.streams, Flux2Adapter.streams, QwenImageAdapter.streams
BF16 = torch.bfloat16
SHALLOW = {"num_layers": 2, "num_single_layers": 3}
"""Every block of a kind does the same work, so a few of real width are counted."""
KLEIN = {"guidance_embeds": False, "attention_head_dim": 128}
KLEIN_9B = KLEIN | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
KLEIN_4B = KLEIN | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}


@cache
def build(cls, **config):
    """To be called and asked, not changed."""
    with torch.device("meta"):
        return cls(**config).to(BF16).eval()


def kontext(**config):
    return build(diffusers.FluxTransformer2DModel, guidance_embeds=True, **config)


def empty(*shape):
    return torch.empty(*shape, device="meta", dtype=BF16)


def call_flux(model, tokens, batch=1):
    rows = tokens.generation + tokens.references
    model(
        hidden_states=empty(batch, rows, 64),
        encoder_hidden_states=empty(batch, tokens.text, model.config.joint_attention_dim),
        pooled_projections=empty(batch, 768),
        timestep=empty(batch),
        guidance=empty(batch),
        img_ids=empty(rows, 3),
        txt_ids=empty(tokens.text, 3),
    )


def call_flux2(model, tokens, batch=1):
    rows, extra = tokens.generation + tokens.references, {}
    if tokens.split:
        extra = {"kv_cache_mode": "extract", "num_ref_tokens": tokens.references}
    elif tokens.cached:
        cache = Flux2KVCache(model.config.num_layers, model.config.num_single_layers)
        cache.num_ref_tokens = tokens.cached
        width = model.config.num_attention_heads, model.config.attention_head_dim
        for layer in [*cache.double_block_caches, *cache.single_block_caches]:
            layer.store(empty(batch, tokens.cached, *width), empty(batch, tokens.cached, *width))
        extra = {"kv_cache_mode": "cached", "kv_cache": cache}
    model(
        hidden_states=empty(batch, rows, 128),
        encoder_hidden_states=empty(batch, tokens.text, model.config.joint_attention_dim),
        timestep=empty(batch),
        guidance=empty(batch) if model.config.guidance_embeds else None,
        img_ids=empty(rows, 4),
        txt_ids=empty(tokens.text, 4),
        **extra,
    )


def call_qwen(model, tokens, batch=1):
    rows = tokens.generation + tokens.references
    with torch.device("meta"):
        model(
            hidden_states=empty(batch, rows, 64),
            encoder_hidden_states=empty(batch, tokens.text, model.config.joint_attention_dim),
            timestep=empty(batch),
            img_shapes=[[(1, 64, tokens.generation // 64), (1, 32, tokens.references // 32)]] * batch,
        )


def counted(call, model, tokens, batch=1):
    """FLOPs of a call as (matrix products of Linear layers, attention), by torch's own counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(model, tokens, batch)
    by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in by_op.items() if "bmm" in op or "attention" in op)
    return Flops(matmul=counter.get_total_flops() - attention, attention=attention)


def with_kv_processors(model):
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


# --- FLOPs at real size


def test_kontext_at_real_size():
    model = kontext()
    shape = ModelShape.from_module(model, FLUX_STREAMS)
    dense = step_flops(shape, StepTokens(text=512, generation=4096, references=4096))
    assert dense.total / 1e12 == pytest.approx(165.46, abs=0.005)
    few = kontext(**SHALLOW)
    for tokens, batch in (
        (StepTokens(512, 4096, 4096), 1),
        (StepTokens(512, 4096, 600), 1),
        (StepTokens(77, 4096, 0), 2),
    ):
        own = step_flops(ModelShape.from_module(few, FLUX_STREAMS), tokens, batch)
        assert own == counted(call_flux, few, tokens, batch)
    assert (shape.attention_layers, shape.heads, shape.head_dim, shape.dtype_bytes) == (57, 24, 128, 2)
    assert shape.parameter_bytes == 2 * sum(p.numel() for p in model.parameters())
    assert shape.parameter_bytes / 2e9 == pytest.approx(11.9, abs=0.05)


def test_the_flop_ratios_of_the_papers_budgets():
    """The bounds that ReCAST's 2.4x has to be held against: FLOP ratios of a Kontext step by reference rows."""
    shape = ModelShape.from_module(kontext(), FLUX_STREAMS)
    dense = step_flops(shape, StepTokens(512, 4096, 4096)).total
    ratios = {r: dense / step_flops(shape, StepTokens(512, 4096, r)).total for r in (2048, 1024, 600, 512, 256, 0)}
    assert {r: round(x, 2) for r, x in ratios.items()} == {
        2048: 1.41,
        1024: 1.74,
        600: 1.92,
        512: 1.96,
        256: 2.08,
        0: 2.22,
    }


@pytest.mark.parametrize(
    ("config", "billions"), [({}, 32.2), (KLEIN_9B, 9.1), (KLEIN_4B, 3.9)], ids=["dev", "klein-9B", "klein-4B"]
)
def test_flux2_at_real_size(config, billions):
    model = build(diffusers.Flux2Transformer2DModel, **config)
    shape = ModelShape.from_module(model, FLUX2_STREAMS)
    assert shape.parameter_bytes / 2e9 == pytest.approx(billions, abs=0.1)
    model = build(diffusers.Flux2Transformer2DModel, **config | SHALLOW)
    shape = ModelShape.from_module(model, FLUX2_STREAMS)
    for tokens, batch in ((StepTokens(512, 4096, 8192), 1), (StepTokens(512, 4096, 410), 2)):
        assert step_flops(shape, tokens, batch) == counted(call_flux2, model, tokens, batch)


def test_klein_kv_extract_and_cached_steps():
    model = with_kv_processors(copy.deepcopy(build(diffusers.Flux2Transformer2DModel, **KLEIN_9B | SHALLOW)))
    shape = ModelShape.from_module(model, FLUX2_STREAMS)
    for tokens, batch in (
        (StepTokens(512, 4096, 4096, split=True), 1),
        (StepTokens(512, 4096, 1024, split=True), 2),
        (StepTokens(512, 4096, 0, cached=4096), 1),
        (StepTokens(512, 4096, 0, cached=4096), 2),
    ):
        assert step_flops(shape, tokens, batch) == counted(call_flux2, model, tokens, batch)


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_qwen_image_at_real_size(zero_cond_t):
    model = build(diffusers.QwenImageTransformer2DModel, zero_cond_t=zero_cond_t)
    shape = ModelShape.from_module(model, QWEN_STREAMS, reference_timestep=zero_cond_t)
    assert shape.parameter_bytes / 2e9 == pytest.approx(20.4, abs=0.1)
    model = build(diffusers.QwenImageTransformer2DModel, num_layers=2, zero_cond_t=zero_cond_t)
    shape = ModelShape.from_module(model, QWEN_STREAMS, reference_timestep=zero_cond_t)
    for tokens, batch in ((StepTokens(300, 4096, 4096), 1), (StepTokens(300, 4096, 1024), 2)):
        assert step_flops(shape, tokens, batch) == counted(call_qwen, model, tokens, batch)


# --- tokens, scoring, runs, bound

SMALL = ModelShape(
    "small", 10, 10, 6, 5, 2, attention_layers=3, heads=2, head_dim=4, parameter_bytes=100, dtype_bytes=2
)


def test_tokens_of_a_layout():
    layout = TokenLayout(rows=30, text=7, generation=(0, 10), references=(Reference(10, 12), Reference(22, 8)))
    assert StepTokens.of(layout) == StepTokens(7, 10, 20)
    assert StepTokens.of(layout, kept=5) == StepTokens(7, 10, 5)
    for bad in ({"text": -1}, {"references": -1}, {"cached": 3, "split": True}):
        with pytest.raises(ConfigError):
            StepTokens(**({"text": 1, "generation": 1, "references": 1} | bad))


def test_rows_that_leave_by_depth_count_until_they_leave():
    """Two double blocks of 3 and a single one of 6 after an embedder of 4; 5 of 8 rows leave at block 2."""
    layout = TokenLayout(rows=18, text=2, generation=(0, 10), references=(Reference(10, 8),))
    tokens = StepTokens.of(layout, kept=3, from_block=2)
    assert tokens == StepTokens(2, 10, 3, dropped=5, from_block=2)
    assert StepTokens.of(layout, kept=8, from_block=2) == StepTokens(2, 10, 8)
    shape = replace(SMALL, image=10, joint=6, leading=(4, 7, 10))
    at_input, dense = step_flops(shape, StepTokens(2, 10, 3)), step_flops(shape, StepTokens(2, 10, 8))
    got = step_flops(shape, tokens)
    assert got.matmul == at_input.matmul + 2 * 5 * 10
    assert got.attention == 4 * 2 * 4 * (20**2 + 20**2 + 15**2)
    assert at_input.total < got.total < dense.total
    assert step_memory(shape, tokens) == step_memory(shape, StepTokens(2, 10, 8))
    for bad in ({"dropped": 1}, {"from_block": 1}, {"dropped": 1, "from_block": 1, "cached": 1}):
        with pytest.raises(ConfigError, match="leave by depth"):
            StepTokens(1, 1, 1, **bad)
    with pytest.raises(ConfigError, match=r"before the last of the 3 blocks .* got block 3"):
        step_flops(shape, replace(tokens, from_block=3))


def test_output_rows_can_be_the_generation_only():
    tokens = StepTokens(1, 4, 3)
    less = step_flops(replace(SMALL, output_rows="generation"), tokens)
    assert step_flops(SMALL, tokens).matmul - less.matmul == 2 * 2 * 3


def test_scoring_of_kontexts_single_blocks():
    """0.103 TFLOP a block for 4096 x 4096 x 24 x 128."""
    shape = ModelShape.from_module(kontext(), FLUX_STREAMS)
    assert scoring_flops(shape, 4096, 4096, blocks=1).total / 1e12 == pytest.approx(0.103, abs=0.0005)
    assert scoring_flops(shape, 1024, 4096, blocks=38, batch=2).total == 19 * scoring_flops(shape, 4096, 4096, 1).total


def test_a_run_is_the_sum_of_its_steps_and_its_scoring():
    dense, sparse = StepTokens(2, 8, 8), StepTokens(2, 8, 2)
    scoring = scoring_flops(SMALL, 8, 8, blocks=3)
    run = run_flops(SMALL, [dense, sparse, sparse], batch=1, calls=2, scoring=scoring)
    assert run == 2 * step_flops(SMALL, dense) + 4 * step_flops(SMALL, sparse) + scoring


def test_the_bound_scales_each_part_by_its_own_work():
    dense, sparse = step_flops(SMALL, StepTokens(2, 8, 8)), step_flops(SMALL, StepTokens(2, 8, 2))
    assert bound_seconds(dense, dense, 3.0, 5.0) == 8.0
    assert bound_seconds(dense, sparse, 3.0, 0.0) == pytest.approx(3.0 * 12**2 / 18**2)
    assert bound_seconds(dense, sparse, 0.0, 5.0, fixed_seconds=1.0) == pytest.approx(
        1.0 + 5.0 * sparse.matmul / dense.matmul
    )
    for bad in ((dense, sparse, -1.0, 1.0), (dense, sparse, 1.0, -1.0), (Flops(1, 0), sparse, 1.0, 1.0)):
        with pytest.raises(ConfigError):
            bound_seconds(*bad)


# --- memory


def test_reference_kv_of_four_references():
    """8.6 GB on klein-9B, 22.5 GB on FLUX.2 dev, bf16."""
    for config, gigabytes in ((KLEIN_9B, 8.6), ({}, 22.5)):
        shape = ModelShape.from_module(build(diffusers.Flux2Transformer2DModel, **config), FLUX2_STREAMS)
        assert reference_kv_bytes(shape, 4 * 4096) / 1e9 == pytest.approx(gigabytes, abs=0.05)
        assert step_memory(shape, StepTokens(512, 4096, 0, cached=4096)).reference_kv == reference_kv_bytes(shape, 4096)
        extract = step_memory(shape, StepTokens(512, 4096, 4096, split=True), batch=2)
        assert extract.reference_kv == reference_kv_bytes(shape, 4096, batch=2)
        assert extract.total == extract.parameters + extract.activations + extract.reference_kv


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes of all tensors alive at once, parameters apart."""

    def __init__(self, model):
        super().__init__()
        self.parameters = [p.untyped_storage() for p in model.parameters()]
        self.sizes = {storage._cdata: 0 for storage in self.parameters}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.sizes:
                storage = leaf.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage._cdata)
        return out

    def forget(self, key):
        self.live -= self.sizes.pop(key)


class FlashAttention(TorchFunctionMode):
    """Attention that stores its output only, as the kernels do; on meta SDPA would store the S x S matrix."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(kwargs["query"] if "query" in kwargs else args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("cls", "config", "streams", "call"),
    [
        (diffusers.FluxTransformer2DModel, {"num_single_layers": 2, "guidance_embeds": True}, FLUX_STREAMS, call_flux),
        (diffusers.Flux2Transformer2DModel, {"num_single_layers": 2}, FLUX2_STREAMS, call_flux2),
        (diffusers.Flux2Transformer2DModel, KLEIN_9B | {"num_single_layers": 2}, FLUX2_STREAMS, call_flux2),
        (diffusers.QwenImageTransformer2DModel, {}, QWEN_STREAMS, call_qwen),
        (diffusers.QwenImageTransformer2DModel, {"zero_cond_t": True}, QWEN_STREAMS, call_qwen),
    ],
    ids=["kontext", "flux2-dev", "klein-9B", "qwen", "qwen-2511"],
)
@pytest.mark.parametrize("references", [1024, 4096])
def test_activations_are_estimated_within_15_percent(cls, config, streams, call, references):
    model = build(cls, **(config | {"num_layers": 2}))
    tokens = StepTokens(512, 4096, references)
    with torch.no_grad(), FlashAttention(), LiveBytes(model) as memory:
        call(model, tokens)
    estimate = step_memory(ModelShape.from_module(model, streams), tokens).activations
    assert estimate == pytest.approx(memory.peak, rel=0.15)

"""Modular pipelines, which lack methods and attributes of the others: served, or refused in words."""

from __future__ import annotations

import copy
import logging
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.flux2.modular_blocks_flux2_klein import Flux2KleinAutoBlocks

import sparse_ref_attn as sra
from sparse_ref_attn.errors import IncompatibleError, UnsupportedModelError
from sparse_ref_attn.eval.compare import compare
from tests.pictures import generator, picture
from tests.pipelines import CASES


def build() -> Any:
    source = CASES["klein"].build()
    pipe = Flux2KleinAutoBlocks().init_pipeline()
    own = {n: c for n, c in source.components.items() if n in pipe.component_names and c is not None}
    pipe.update_components(**own)
    return pipe


def call(pipe: Any, steps: int = 3, seed: int = 3) -> np.ndarray:
    return np.asarray(
        pipe(
            prompt="a cat", image=picture(64, 64, seed), num_inference_steps=steps, height=64, width=64,
            max_sequence_length=48, text_encoder_out_layers=(1, 2, 3), output="images", output_type="np",
            generator=generator(0),
        )
    )  # fmt: skip


SERVED = {
    "mass": sra.SparseRef("mass", 0.25),
    "edges": sra.SparseRef("edges", 0.25),
    "saliency": sra.SparseRef("saliency", 0.25),
    "by depth": sra.SparseRef("grid", 0.25, from_block=1),
    "in flight": sra.ReCAST(task="subject", profile="in_flight"),
    "merged": sra.SparseRef(sra.ToMe(), 0.25),
    "downscaled latents": sra.SparseRef(sra.Downscale(source="latents"), 0.25),
}


@cache
def dense_picture() -> np.ndarray:
    return call(build())


def test_every_token_kept() -> None:
    pipe = build()
    with sra.patched(pipe, sra.SparseRef("mass", 1.0)) as handle:
        assert np.array_equal(call(pipe), dense_picture())
        assert handle.record.steps[0].kind == "profile"


@pytest.mark.parametrize("name", SERVED)
def test_it_runs_sparse_and_is_as_it_was(name: str) -> None:
    pipe, dense = build(), dense_picture()
    with sra.patched(pipe, SERVED[name]) as handle:
        assert not np.array_equal(call(pipe), dense)
        assert handle.record.steps[-1].kept == 16
        assert "sparse" in handle.summary()
    assert np.array_equal(call(pipe), dense)


def test_selectors_see_the_pixels_that_it_encoded() -> None:
    pipe = build()
    pipe.vae.encode(torch.randn(1, 3, 64, 64))  # somebody else's, before the call
    with sra.patched(pipe, sra.SparseRef("edges", 0.25)) as handle:
        for seed in (3, 4):
            call(pipe, seed=seed)
            (own,) = handle.record.pixels
            want = torch.from_numpy(np.asarray(picture(64, 64, seed)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
            assert torch.allclose(own, want, atol=1e-6)


def test_what_encodes_images_is_refused_in_words_and_leaves_the_patch_whole() -> None:
    pipe = build()
    dense = call(pipe)
    handle = sra.patch(pipe, sra.SparseRef(sra.Downscale(), 0.25))
    for _ in range(2):
        with pytest.raises(IncompatibleError, match=r"Flux2KleinModularPipeline has none: it cannot encode images"):
            call(pipe)
    handle.remove()
    assert np.array_equal(call(pipe), dense)


def test_a_pipeline_without_references_of_its_own_cannot_encode_them_either() -> None:
    """Somebody's pipeline around the transformer and a VAE, with a call of its own."""
    case = CASES["kontext"]
    source = case.build()

    class Mine:
        def __init__(self) -> None:
            self.transformer, self.vae, self.scheduler = source.transformer, source.vae, source.scheduler

        def __call__(self) -> Any:
            return type(source).__call__(self._as_kontext(), **case_arguments())

        def _as_kontext(self) -> Any:
            return source

    def case_arguments() -> dict[str, Any]:
        return {
            "prompt": "a", "image": picture(48, 32, 1), "height": 32, "width": 32, "num_inference_steps": 2,
            "max_area": 32 * 32, "_auto_resize": False, "max_sequence_length": 32, "generator": generator(0),
        }  # fmt: skip

    mine = Mine()
    with (
        sra.patched(mine, sra.SparseRef(sra.Downscale(), 0.25)),
        pytest.raises(IncompatibleError, match="Mine has none: it cannot encode images"),
    ):
        mine()


def test_a_batch_is_refused_in_words() -> None:
    pipe = build()
    request = {"num_inference_steps": 2, "height": 64, "width": 64}
    with pytest.raises(UnsupportedModelError, match=r"with progress_bar, maybe_free_model_hooks, as diffusers'"):
        sra.batch(pipe, ["a"], [[picture(64, 64, 1)]], config=sra.SparseRef("grid", 0.5), **request)
    bare = SimpleNamespace(transformer=pipe.transformer)
    with pytest.raises(UnsupportedModelError, match="a batch needs a pipeline with scheduler, progress_bar"):
        sra.batch(bare, ["a"], [[picture(64, 64, 1)]], config=sra.SparseRef("grid", 0.5), **request)
    call(pipe)


def test_it_is_trained_and_compared_like_the_others() -> None:
    pipe = build()
    sra.patch_for_training(pipe.transformer, sra.RandomDrop()).remove()
    result = compare(pipe, sra.SparseRef("grid", 0.25), lambda steps: call(pipe, steps)[0], steps=2)
    assert result.flop_ratio is not None
    assert result.flop_ratio > 1


def test_one_that_has_no_transformer_yet_is_refused_in_words() -> None:
    with pytest.raises(UnsupportedModelError, match="there must be a pipeline with a transformer"):
        sra.patch(Flux2KleinAutoBlocks().init_pipeline(), sra.SparseRef("grid", 0.5))


def test_a_run_past_the_patch_and_a_replaced_transformer_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    pipe = build()
    handle = sra.patch(pipe, sra.SparseRef("grid", 0.5))
    call(pipe)
    published, own = type(pipe.transformer), pipe.transformer
    own.__class__ = type("Around", (published,), {"__call__": published.forward})
    with caplog.at_level(logging.WARNING, "sparse_ref_attn"):
        call(pipe)
        assert sum("ran without its own call" in record.message for record in caplog.records) == 1
        with pytest.raises(sra.SparseRefError, match="ran without its own call"):
            handle.summary()
        own.__class__ = published
        pipe.update_components(transformer=copy.deepcopy(own))
        call(pipe)
        assert sum("pipe.transformer is another one" in record.message for record in caplog.records) == 1
        with pytest.raises(sra.SparseRefError, match=r"pipe\.transformer is another one"):
            handle.summary()

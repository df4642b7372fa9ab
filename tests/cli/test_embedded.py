"""The pipeline that needs no weights, and the clock that times it."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.eval.clock import time_call
from sparse_ref_attn.eval.compare import compare
from sparse_ref_attn.eval.embedded import kontext_pipeline
from sparse_ref_attn.models import adapter_for
from tests.cli.commands import embedded_call
from tests.pictures import picture


def test_embedded_pipeline_is_seeded_and_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    pipe, same, other = kontext_pipeline("tiny"), kontext_pipeline("tiny"), kontext_pipeline("tiny", seed=1)
    assert torch.equal(torch.rand(3), expected)
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        first, second, third = (
            torch.nn.utils.parameters_to_vector(getattr(p, component).parameters()) for p in (pipe, same, other)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    with pytest.raises(sra.ConfigError, match="size must be one of 'large', 'tiny', got 'huge'"):
        kontext_pipeline("huge")


def test_embedded_picture_depends_on_the_reference() -> None:
    pipe = kontext_pipeline("tiny")
    a, b = (np.asarray(embedded_call(pipe, picture(32, 32, seed)), dtype=float) for seed in (0, 1))
    assert np.abs(a - b).mean() > 1  # of 255


def test_timing_a_call_leaves_nothing_behind() -> None:
    pipe, image = kontext_pipeline("tiny"), picture(32, 32)
    alone = embedded_call(pipe, image)
    transformer = pipe.transformer
    before = [vars(site.processor).copy() for site in adapter_for(transformer).sites(transformer)]
    timed, times = time_call(
        lambda: embedded_call(pipe, image), transformer, adapter_for(transformer).sites(transformer)
    )
    assert np.array_equal(np.asarray(timed), np.asarray(alone))
    assert 0 < (times.attention or 0) < times.transformer < times.whole
    assert times.fixed == pytest.approx(times.whole - times.transformer)
    assert [vars(site.processor) for site in adapter_for(transformer).sites(transformer)] == before
    assert not transformer._forward_hooks
    assert not transformer._forward_pre_hooks


def test_compare_takes_medians_of_interleaved_runs() -> None:
    pipe, image = kontext_pipeline("tiny"), picture(32, 32)
    pipe.set_progress_bar_config(disable=True)
    asked: list[int] = []

    def call(steps: int) -> PIL.Image.Image:
        asked.append(steps)
        return embedded_call(pipe, image, steps)

    result = compare(pipe, sra.SparseContext(0.25, "grid"), call, steps=3, repeats=3)
    assert asked == [1, 2] + [3] * 6
    assert len(result.dense_times) == len(result.sparse_times) == 3
    assert result.dense is not None
    assert result.dense.whole == sorted(t.whole for t in result.dense_times)[1]
    assert pipe._progress_bar_config == {"disable": True}
    with pytest.raises(sra.HandleRemovedError):
        result.handle.begin(1)

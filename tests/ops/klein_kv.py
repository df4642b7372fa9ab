"""Klein-KV's cached step with the reference K/V read by index instead of concatenated, in a tiny real pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers.models.transformers.transformer_flux2 as flux2
import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_ref_attn.functional import gather_attention

from ..builds import made
from ..pipelines import CASES
from .rounded_run import of_run
from .rounding import assert_rounded
from .tolerance import assert_as_accurate

CASE = CASES["klein_kv"]
BATCH, REFERENCES = 2, 12 * 8  # prompts, and tokens of the first reference
KEPT = 29

Attention = Callable[..., Tensor]


def build() -> Any:
    return CASE.build(layers=1, single=1, heads=2, head_dim=32)


def picture(pipe: Any) -> np.ndarray:
    """One step that fills the cache and one that reads it."""
    return CASE.call(pipe, batch=BATCH, steps=2)


def rows() -> Tensor:
    """(BATCH, KEPT) rows of the cache: each prompt keeps its own, in no order."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(REFERENCES, generator=generator)[:KEPT] for _ in range(BATCH)])


def gathered(kept: Tensor) -> Attention:
    """diffusers' own cached attention, over a copy of each prompt's kept rows."""
    own = flux2._flux2_kv_causal_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, text: int, refs: int, kv_cache=None, backend=None) -> Tensor:
        if kv_cache is not None:
            copied = flux2.Flux2KVLayerCache()
            copied.store(*(torch.stack([x[b, kept[b]] for b in range(BATCH)]) for x in kv_cache.get()))
            kv_cache = copied
        return own(query, key, value, text, refs, kv_cache=kv_cache, backend=backend)

    return attend


def by_index(kept: Tensor, ours: str) -> Attention:
    """`gather_attention` on the backend `ours`: text and generation dense, the cache a bank that all prompts share."""
    own = flux2._flux2_kv_causal_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, text: int, refs: int, kv_cache=None, backend=None) -> Tensor:
        if kv_cache is None:
            return own(query, key, value, text, refs, backend=backend)
        k_ref, v_ref = kv_cache.get()
        assert all(torch.equal(x[0], x[1]) for x in (k_ref, v_ref))  # references do not see the prompt
        return gather_attention(
            query, key[:, :text], value[:, :text], k_ref[0], v_ref[0], kept,
            k2=key[:, text:], v2=value[:, text:], backend=ours,
        )  # fmt: skip

    return attend


@contextmanager
def attention(attend: Attention | None) -> Iterator[None]:
    """Inside, Klein-KV's blocks attend with `attend` (None: as published)."""
    own = flux2._flux2_kv_causal_attention
    flux2._flux2_kv_causal_attention = attend or own
    try:
        yield
    finally:
        flux2._flux2_kv_causal_attention = own


def cached_step(pipe: Any) -> dict[str, Any]:
    """What the transformer is given in the step that reads the cache."""
    given: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs["kv_cache_mode"] == "cached":
            given.append(copy.deepcopy(kwargs))  # the pipeline empties the cache when it is done

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    picture(pipe)
    handle.remove()
    (step,) = given
    return step


def converted(step: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same step in another precision, its cache too; positions stay integers.

    At time 0.5 all of the difference is attention's and the layers': the model multiplies the time by 1000, and rounds.
    """
    out = copy.deepcopy(step)
    out["timestep"] = torch.full_like(step["timestep"], 0.5)
    for name, x in out.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            out[name] = x.to(dtype)
    cache = out["kv_cache"]
    for layer in (*cache.double_block_caches, *cache.single_block_caches):
        layer.store(*(x.to(dtype) for x in layer.get()))
    return out


def check_step(backend: str, dtype: torch.dtype) -> None:
    """The cached step by index errs at most twice as much as diffusers' own over gathered copies, both in `dtype`.

    In float32, at most as random rounding does, which is drawn once for all processes of a run. The truth is diffusers'
    own in float64, on weights and inputs rounded to `dtype`; only its rotary embedding is float32, in all three alike.
    """
    pipe, kept = build(), rows()
    step = converted(cached_step(pipe), dtype)
    low = pipe.transformer.to(dtype)
    exact = copy.deepcopy(low).to(torch.float64)

    def run(model: torch.nn.Module, inputs: dict[str, Any], attend: Attention | None) -> Tensor:
        with attention(attend), torch.no_grad():
            return model(**inputs)[0]

    inputs = converted(step, torch.float64)
    truth = run(exact, inputs, gathered(kept))
    if dtype == torch.float32:
        file = "deviation.pt"

        def draw(folder: Path) -> None:
            torch.save(of_run(lambda: run(exact, inputs, gathered(kept))), folder / file)

        deviation = torch.load(made("klein-kv", draw) / file)

        def check(got: Tensor) -> None:
            assert_rounded(got, truth, deviation, "the cached step")
    else:
        copies = run(low, step, gathered(kept))

        def check(got: Tensor) -> None:
            assert_as_accurate(got, truth, copies, "the cached step")

    check(run(low, step, by_index(kept, backend)))
    with pytest.raises(AssertionError, match="the cached step: error"):  # the dropped rows matter
        check(run(low, step, None))


def check_picture(backend: str) -> None:
    """The whole call, float32: finite, and the picture that diffusers' own makes of gathered copies."""
    pipe, kept = build(), rows()
    with attention(by_index(kept, backend)):
        got = picture(pipe)
    with attention(gathered(kept)):
        want = picture(pipe)
    assert np.isfinite(got).all()
    torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(want))
    assert not np.allclose(picture(pipe), want, atol=1e-3)  # nor the one with all references

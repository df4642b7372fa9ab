"""Named shapes of the benchmarks: real widths and real token counts; only depth and steps are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["CACHE_CASES", "CACHE_QUICK", "CASES", "QUICK", "TEXT_TOKENS", "PipelineCase"]

TEXT_TOKENS = 512


@dataclass(frozen=True)
class PipelineCase:
    """One whole ``pipe()`` call.

    Parameters
    ----------
    model : str
        A name that `sparse_ref_attn.adapters.geometries.named_model` takes; its width is kept.
    references : int
        Reference images, each of `side` x `side` pixels, as the output.
    layers, single : int
        Double-stream and single-stream blocks.
    steps : int
        Denoising steps.
    rounds : int
        Times that every method runs.
    side : int
        Pixels; 1024 is 4,096 tokens an image.
    """

    model: str
    references: int
    layers: int
    single: int
    steps: int
    rounds: int = 2
    side: int = 1024


# Cut to what two CPU cores run in minutes; `--real-depth` and `--steps` undo the cuts on a machine that can.
CASES = (
    PipelineCase("kontext", references=1, layers=1, single=1, steps=3),
    PipelineCase("klein-9b", references=1, layers=0, single=1, steps=3),
    PipelineCase("klein-9b", references=2, layers=0, single=1, steps=3),
    PipelineCase("klein-9b", references=4, layers=0, single=1, steps=3),
)

CACHE_CASES = tuple(
    PipelineCase("klein-9b", references=n, layers=0, single=1, steps=4, rounds=1, side=512) for n in (1, 2, 4)
)
"""Klein's four steps: the first, which computes the references, weighs as much as in a real run."""

CACHE_QUICK = tuple(replace(case, steps=2, rounds=1, side=256) for case in CACHE_CASES)

QUICK = tuple(replace(case, steps=2, rounds=1, side=256) for case in CASES)
"""The same at 256 tokens an image: shows that the benchmark runs, and no more."""

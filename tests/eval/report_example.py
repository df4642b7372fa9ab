"""A report by hand: the least that the schema asks for, with two methods and two rivals."""

from __future__ import annotations

from typing import Any

__all__ = ["report"]


def report() -> dict[str, Any]:
    """JSON types, made anew at each call."""
    times = {"seconds": 4.0, "transformer_seconds": 3.5, "attention_seconds": 1.0, "outside_transformer_seconds": 0.5}
    times |= {"each_seconds": [4.0]}
    bound = {"bound_seconds": 1.9, "bound_speedup": 2.1, "measured_over_bound": 0.95}
    rows = [
        {"method": "dense", "seconds": 4.0, "speedup": 1.0, "flop_ratio": 1.0, "SSIM": None, **dict.fromkeys(bound)},
        {"method": "cache", "seconds": 2.0, "speedup": 2.0, "flop_ratio": 2.2, "SSIM": 0.9, **bound, "steps": 3},
        {"method": "edges", "seconds": 2.5, "speedup": 1.6, "flop_ratio": 1.7, "SSIM": 0.8, **bound, "steps": 3},
    ]
    for name, steps, seconds, likeness in (("1 step", 1, 1.5, 0.85), ("TaylorSeer", 3, 2.2, 0.95)):
        rival = {"method": name, "steps": steps, "seconds": seconds, "speedup": 4 / seconds, "flop_ratio": 3.0 / steps}
        rows.append({**dict.fromkeys(bound), **rival, "SSIM": likeness})
    rivals = {
        row["method"]: {"setting": row["method"], "code": "", "each_seconds": [row["seconds"]], **row}
        for row in rows[3:]
    }
    summary = {
        "steps": {"ran": 3},
        "by_step": {"kind": ["dense", "cached", "dense"]},
        "cache": {"exactness": "drifting", "drift": [{"step": 2, "median": 0.1, "worst": 0.25}]},
        "notes": [],
        "config": {},
    }
    return {
        "schema": "sparse_ref_attn.report",
        "version": 1,
        "about": {
            "pipeline": "FluxKontextPipeline",
            "model": "black-forest-labs/FLUX.1-Kontext-dev",
            "transformer": {
                "class": "FluxTransformer2DModel",
                "adapter": "FLUX.1 Kontext",
                "dtype": "bfloat16",
                "weights": "0123456789abcdef" * 4,
                "config": "f" * 64,
            },
            "device": "NVIDIA H100",
            "arguments": {"steps": 3},
            "references": [[1024, 1024]],
            "seed": 0,
            "repeats": 1,
            "date": "2026-11-29",
            "versions": {"torch": "2.13.0", "diffusers": "0.42.1", "sparse-ref-attn": "0.1.0"},
        },
        "call": {
            "output": [1024, 1024],
            "text_tokens": 512,
            "generation_tokens": 4096,
            "reference_tokens": [4096],
            "batch": 1,
        },
        "metrics": [{"name": "SSIM", "higher_is_better": True}],
        "rows": [row | {"tokens_a_step": 4096} for row in rows],
        "refused": {},
        "runs": {
            "cache": {"dense": times, "sparse": times | {"seconds": 2.0}, "run": summary},
            "edges": {"dense": times, "sparse": times | {"seconds": 2.5}, "run": summary | {"cache": None}},
        },
        "rivals": {
            "base_steps": 3,
            "runs": rivals,
            "at_equal_time": {"cache": "1 step", "edges": "1 step"},
            "fewer_steps_win": ["edges"],
        },
    }

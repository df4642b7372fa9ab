"""``sra estimate``: what it does with its arguments."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .. import estimation
from ..estimation import Amount, Estimate
from ..eval.meta_model import assumed_size, meta_transformer, pipeline_of
from ..planning import RunPlan, plan
from .common import settings
from .logs import quiet
from .terminal import show
from .wanted import check_alone

__all__ = ["estimate"]


def estimate(options: argparse.Namespace) -> None:
    """Tokens, work and memory of a run, without running it; with a speed, the setting for it."""
    check_alone(options)
    amount = None if options.speedup else Amount(options.preset, options.keep, settings(options))
    quiet(pipelines_too=True)
    transformer = meta_transformer(options.model)
    pipeline, distilled = pipeline_of(options.model)
    if pipeline is not None:
        pipeline.check_references(options.references)
    if options.steps is None:
        options.steps = 28 if pipeline is None else pipeline.steps(distilled)
    call: dict[str, Any] = {
        "references": [options.reference_size] * options.references,
        "output": options.output,
        "text_tokens": options.text_tokens,
        "steps": options.steps,
    }
    found: Estimate | RunPlan
    if amount is None:
        found = plan(transformer, options.speedup, **call)
    else:
        found = estimation.estimate(transformer, amount.config(transformer, options.steps), **call)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show(found.summary())
        assumed = assumed_size(options.model)
        if assumed is not None:
            show(assumed)

"""``sra estimate``: what it does with its arguments."""

from __future__ import annotations

import argparse
import json

from .. import estimation
from ..estimation import Amount
from ..eval.meta_model import meta_transformer, pipeline_of
from .common import settings
from .logs import quiet
from .terminal import show

__all__ = ["estimate"]


def estimate(options: argparse.Namespace) -> None:
    """Tokens, work and memory of a run, without running it."""
    amount = Amount(options.preset, options.keep, settings(options))
    quiet(pipelines_too=True)
    transformer = meta_transformer(options.model)
    pipeline, distilled = pipeline_of(options.model)
    if pipeline is not None:
        pipeline.check_references(options.references)
    if options.steps is None:
        options.steps = 28 if pipeline is None else pipeline.steps(distilled)
    found = estimation.estimate(
        transformer,
        references=[options.reference_size] * options.references,
        output=options.output,
        text_tokens=options.text_tokens,
        steps=options.steps,
        config=amount.config(transformer, options.steps),
    )
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show(found.summary())

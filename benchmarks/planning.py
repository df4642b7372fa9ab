"""How much work a run of whole pipelines is, before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import sparse_ref_attn as sra

from .methods import FEWER, METHODS
from .shapes import SUITES

__all__ = ["pipeline_flops"]


def pipeline_flops(arguments: Sequence[str]) -> float:
    """FLOPs of ``python -m benchmarks pipeline ARGUMENTS``: every round of every method, its run for memory, the gate.

    A step cache is counted as if it saved nothing, and so is Klein's own cache; fewer steps as one dense run, which is
    more than each of theirs.
    """
    from .bench_pipeline import add_arguments, cases
    from .random_pipelines import transformer_of

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(arguments)
    total = 0.0
    for case in cases(options):
        size, model = (case.side, case.side), transformer_of(case)
        for name in dict.fromkeys(["dense", *(options.methods or SUITES[options.suite].methods)]):
            method = METHODS["dense" if name == FEWER else name]
            if method.cached and not case.model.startswith("klein"):
                continue
            estimate = sra.estimate(
                model, references=[size] * case.references, output=size, text_tokens=case.text_tokens, steps=case.steps,
                config=method.config or sra.SparseRef("grid", 1.0),
            )  # fmt: skip
            total += (case.rounds + 1) * case.batch * estimate.sparse.total
    return total

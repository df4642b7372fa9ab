"""Named shapes of the benchmarks: real widths and real token counts; only depth and steps are cut."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .methods import FEWER, KEPT, METHODS

__all__ = ["QUICK_TEXT_TOKENS", "SUITES", "TEXT_TOKENS", "PipelineCase", "Suite", "changed", "quick"]

TEXT_TOKENS, QUICK_TEXT_TOKENS = 512, 32


@dataclass(frozen=True)
class PipelineCase:
    """One whole ``pipe()`` call.

    Parameters
    ----------
    model : str
        A name that `sparse_ref_attn.models.named_model` takes; its width is kept.
    references : int
        Reference images, each of `side` x `side` pixels, as the output; 1 to 8.
    layers, single : int, optional
        Double-stream and single-stream blocks; None is the published number.
    steps : int
        Denoising steps.
    rounds : int
        Times that every method runs.
    side : int
        Pixels; 1024 is 4,096 tokens an image.
    batch : int
        Images of one call, which share the references.
    heads : int, optional
        Attention heads, None the published number. A cut width shifts the share of attention, so it is for showing
        that a benchmark runs, never for a row that is published.
    text_tokens : int
        Of the prompt.
    """

    model: str
    references: int
    layers: int | None
    single: int | None
    steps: int
    rounds: int = 2
    side: int = 1024
    batch: int = 1
    heads: int | None = None
    text_tokens: int = TEXT_TOKENS

    def __str__(self) -> str:
        depth = "published depth" if self.layers is None else f"{self.layers}+{self.single} blocks"
        return (
            f"{self.model}, {self.references} reference(s), {self.side} px, batch {self.batch}, {self.steps} steps, "
            f"{depth}"
        )


@dataclass(frozen=True)
class Suite:
    """Cases, the methods that run on each, and the start of the CSV file's name.

    Parameters
    ----------
    about : str
        One line for ``--help``.
    cases : tuple of PipelineCase
    methods : tuple of str
        Names of `methods.METHODS`; the dense run is always there.
    stem : str
        Rows go to ``results/<stem>_<device>.csv``.
    """

    about: str
    cases: tuple[PipelineCase, ...]
    methods: tuple[str, ...]
    stem: str


def quick(case: PipelineCase) -> PipelineCase:
    """The same at 256 tokens an image, 32 of text, two heads, few blocks: shows that a benchmark runs, and no more."""
    small = replace(case, steps=2, rounds=1, side=256, heads=2, text_tokens=QUICK_TEXT_TOKENS)
    return replace(small, layers=1, single=1) if case.layers is None else small


def changed(cases: Iterable[PipelineCase], options: argparse.Namespace) -> list[PipelineCase]:
    """Cases as ``--quick``, ``--steps``, ``--side``, ``--blocks``, ``--real-depth``, ``--rounds`` say, each once."""
    out: list[PipelineCase] = []
    for case in cases:
        case = quick(case) if options.quick else case
        if options.real_depth:
            case = replace(case, layers=None, single=None)
        if options.blocks is not None:
            case = replace(case, layers=options.blocks, single=0 if case.model.startswith("qwen") else options.blocks)
        case = replace(
            case, steps=options.steps or case.steps, rounds=options.rounds or case.rounds,
            side=options.side or case.side,
        )  # fmt: skip
        if case not in out:
            out.append(case)
    return out


# Cut to what two CPU cores run in minutes; `--real-depth` and `--steps` undo the cuts on a machine that can.
KONTEXT = PipelineCase("kontext", references=1, layers=1, single=1, steps=3)
KLEIN = PipelineCase("klein-9b", references=1, layers=0, single=1, steps=3)
SMALL = replace(KLEIN, steps=2, rounds=1, side=512)
REAL_KONTEXT = PipelineCase("kontext", references=1, layers=None, single=None, steps=28)
REAL_KLEIN = PipelineCase("klein-9b", references=1, layers=None, single=None, steps=4)

EXECUTIONS = tuple(f"{execute} {keep:.0%}" for execute in ("tokens", "cache", "both") for keep in KEPT)
SWEPT = ("edges 25%", "edges 5%", "downscale 25%")

SUITES: dict[str, Suite] = {
    "pipeline": Suite(
        "whole pipe() calls of FLUX.1 Kontext and FLUX.2 Klein 9B",
        (KONTEXT, KLEIN, replace(KLEIN, references=2), replace(KLEIN, references=4)),
        ("edges 25%", "edges 10%", "edges 5%", "ReCAST", "downscale 25%", FEWER),
        "pipeline",
    ),
    "cache": Suite(
        "Klein with tokens dropped, references cached, and both, beside the pipeline's own cache",
        tuple(replace(KLEIN, references=n, steps=4, rounds=1, side=512) for n in (1, 2, 4)),
        ("Klein-KV", *EXECUTIONS),
        "cache",
    ),
    "stored": Suite(
        "references stored in full steps and read in the others, beside tokens dropped",
        tuple(
            replace(case, steps=4, rounds=1, side=512)
            for case in (
                KONTEXT,
                KLEIN,
                replace(KLEIN, references=2),
                replace(KLEIN, references=4),
                replace(KLEIN, model="flux2-dev", references=2),
            )
        ),
        ("tokens 25%", "stored", "stored once", "isolated", "stored once, 25% read", "stored, tiles", FEWER),
        "stored",
    ),
    "step-cache": Suite(
        "step caches beside ours, and the two together",
        tuple(replace(case, layers=2, single=2, steps=8, rounds=1, side=512) for case in (KONTEXT, KLEIN)),
        ("edges 25%", *(name for name, method in METHODS.items() if method.step_cache), FEWER),
        "step_cache",
    ),
    "references": Suite(
        "scaling in references",
        tuple(replace(SMALL, references=n) for n in (1, 2, 3, 4, 6, 8)),
        SWEPT,
        "scaling",
    ),
    "kept": Suite(
        "scaling in the kept ratio",
        (replace(SMALL, references=2),),
        tuple(name for name in METHODS if name.startswith("edges")),
        "scaling",
    ),
    "side": Suite(
        "scaling in resolution",
        tuple(replace(SMALL, side=side) for side in (256, 512, 768, 1024)),
        SWEPT,
        "scaling",
    ),
    "batch": Suite(
        "scaling in the pipeline's own batch",
        tuple(replace(SMALL, batch=n) for n in (1, 2, 4)),
        SWEPT,
        "scaling",
    ),
    "geometries": Suite(
        "every named model, one block of each kind",
        tuple(
            replace(KONTEXT, model=name, single=0 if name.startswith("qwen") else 1, steps=2, rounds=1, side=512)
            for name in ("kontext", "flux2-dev", "klein-9b", "klein-4b", "qwen-image-edit", "qwen-image-edit-2511")
        ),
        SWEPT,
        "geometries",
    ),
    "end-to-end": Suite(
        "real size: Kontext in 28 steps, Klein 9B in 4 with 1 to 4 references; needs a card",
        (REAL_KONTEXT, *(replace(REAL_KLEIN, references=n) for n in (1, 2, 3, 4))),
        ("ReCAST", "downscale 25%", "Klein-KV", FEWER, *(name for name in EXECUTIONS if not name.endswith("50%"))),
        "end_to_end",
    ),
}

"""Items with references of their own: one by one, as one batch (`sra.batch`), and padded, beside the bound.

    python -m benchmarks batch             # every case, rows appended to benchmarks/results/batch_<device>.csv
    python -m benchmarks batch --quick     # a minute: shows that it runs, writes no rows

All methods run in turn, for several rounds, in one process. "one by one" patches the pipeline and calls it for each
item. "padded" is what one would write instead: the transformer on the longest item's kept rows for every item, without
the mask that it would need, so it is faster than any padding that gives right pictures. The bound of the batch is

    attention seconds one by one + remaining transformer seconds x matrix-product work as it runs over one by one
    + seconds outside the transformer

Packed items (FLUX.2) do the work of the items and no more; padded rows (Kontext) pass through the matrix products. Of
"padded" the attention's work is that of the padded rows too. On a
CPU one item keeps all cores busy, so a batch is not expected to be faster than its items one by one.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.eval.clock import time_call, timed
from sparse_ref_attn.eval.counted import sites_of

from .memory import peak_memory, reserve
from .options import Output, add_cuts, add_shared, prepare
from .random_pipelines import build, embeddings, own_arguments, photos, transformer_of
from .results import ENVIRONMENT
from .runs import about
from .shapes import PipelineCase, changed

__all__ = ["add_arguments", "bench", "run"]

COLUMNS = (
    *ENVIRONMENT, "model", "width", "depth", "steps", "references", "side", "batch", "rows", "method",
    "seconds_median", "seconds_min", "seconds_max", "rounds", "bound_seconds", "measured_over_bound",
    "speedup_over_one_by_one", "speedup_over_padded", "gate",
)  # fmt: skip
CONFIG = sra.SparseContext(0.25, "edges")


@dataclass(frozen=True)
class BatchCase:
    """A model, and the sides in pixels of each item's references."""

    model: PipelineCase
    references: tuple[tuple[int, ...], ...]


CASES = (
    BatchCase(
        PipelineCase("klein-9b", references=0, layers=0, single=1, steps=2, side=512), ((512,), (512, 512, 512), ())
    ),
    BatchCase(PipelineCase("kontext", references=0, layers=1, single=1, steps=2, side=512), ((512,), (256,), ())),
)


@dataclass
class Runs:
    """Seconds of each method, one entry a round; of "one by one" also those inside."""

    total: dict[str, list[float]] = field(default_factory=dict)
    transformer: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)


class Items:
    """The items of a case as calls."""

    def __init__(self, pipe: Any, case: BatchCase) -> None:
        self.pipe, self.case = pipe, case
        self.prompts = [embeddings(pipe, seed) for seed in range(len(case.references))]

    def _calls(self, side: int, steps: int) -> list[dict[str, Any]]:
        own = own_arguments(self.pipe, side)
        own |= {"height": side, "width": side, "num_inference_steps": steps, "output_type": "np"}
        return [prompt | own for prompt in self.prompts]

    def _images(self, side: int) -> list[list[Any]]:
        scale = side / self.case.model.side
        return [
            [photo.resize((int(s * scale),) * 2) for photo, s in zip(photos(len(sides), side), sides, strict=True)]
            for sides in self.case.references
        ]

    def one_by_one(self, side: int, steps: int, seen: list[dict[str, Any]] | None = None) -> list[np.ndarray]:
        """Each item's own call of the patched pipeline; `seen` takes the arguments of every transformer call."""
        out = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(sra.patched(self.pipe, CONFIG))
            if seen is not None:  # after the patch, so that the rows are those it keeps

                def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                    seen.append(kwargs)

                stack.callback(self.pipe.transformer.register_forward_pre_hook(note, with_kwargs=True).remove)
            for i, (call, images) in enumerate(zip(self._calls(side, steps), self._images(side), strict=True)):
                given = {"image": images[0] if len(images) == 1 else images} if images else {}
                out.append(self.pipe(**call, **given, generator=torch.Generator().manual_seed(i)).images[0])
        return out

    def batch(self, side: int, steps: int) -> list[np.ndarray]:
        """All items at once."""
        count = len(self.prompts)
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        return sra.batch(
            self.pipe, [None] * count, self._images(side), config=CONFIG, generators=generators,
            each=self._calls(side, steps),
        ).images  # fmt: skip


def passes_gate(items: Items) -> bool:
    """At 256 x 256 each picture of the batch is the item's own: ten times nearer than the items are to one another."""
    alone, together = items.one_by_one(256, 2), items.batch(256, 2)
    own = max(np.abs(a - b).mean() for a, b in zip(alone, together, strict=True))
    other = min(np.abs(a - b).mean() for i, a in enumerate(alone) for b in alone[:i])
    print(f"  gate: {own:.2g} from the items alone, which differ by {other:.2g}")
    return bool(np.isfinite(together).all()) and own < other / 10


def padded_call(calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The call with most rows, once for each item of a step."""
    longest = max(calls, key=lambda kwargs: kwargs["hidden_states"].shape[1])
    batch = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
    repeated = {name: longest[name] for name in batch if longest.get(name) is not None}
    return longest | {name: torch.cat([value] * len(calls)) for name, value in repeated.items()}


def bench(case: BatchCase, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Run one case and return its rows."""
    pipe = build(case.model, device, dtype)
    items, side, steps = Items(pipe, case), case.model.side, case.model.steps
    if not passes_gate(items):
        raise RuntimeError(f"the correctness gate of {case} is red: no time is reported")
    held = peak_memory()
    calls: list[dict[str, Any]] = []
    items.one_by_one(side, 1, calls)
    padded = padded_call(calls)
    pipe.transformer(**padded)
    if device.type == "cpu":
        reserve(3 * (peak_memory() - held) // 2)
    runs = Runs({"one by one": [], "batch": [], "padded": []})
    for number in range(case.model.rounds):
        _, times = time_call(lambda: items.one_by_one(side, steps), pipe.transformer, sites_of(pipe.transformer))
        runs.total["one by one"].append(times.whole)
        runs.transformer.append(times.transformer)
        runs.attention.append(times.attention or 0.0)
        runs.total["batch"].append(timed(lambda: items.batch(side, steps), device)[0])
        outside = times.whole - times.transformer
        seconds = timed(lambda: [pipe.transformer(**padded) for _ in range(steps)], device)[0]
        runs.total["padded"].append(seconds + outside)
        shown = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in runs.total.items())
        print(f"  round {number + 1}: {shown}", flush=True)
    return rows_of(case, pipe, calls, runs)


def which(case: BatchCase, transformer: Any) -> dict[str, Any]:
    """The columns that say which call was timed."""
    items = {"references": "+".join(str(len(sides)) for sides in case.references), "batch": len(case.references)}
    return about(case.model, transformer) | items


def rows_of(case: BatchCase, pipe: Any, calls: Sequence[dict[str, Any]], runs: Runs) -> list[dict[str, Any]]:
    """One row a method, each beside its bound."""
    text = calls[0]["encoder_hidden_states"].shape[1]
    rows = [kwargs["hidden_states"].shape[1] for kwargs in calls]
    joint = [n + text for n in rows]
    padding = len(joint) * max(joint) / sum(joint)
    attention, transformer = median(runs.attention), median(runs.transformer)
    outside = median(t - x for t, x in zip(runs.total["one by one"], runs.transformer, strict=True))
    seconds = {name: median(values) for name, values in runs.total.items()}
    work = 1.0 if case.model.model.startswith("klein") else padding
    remaining = transformer - attention
    bounds = {
        "one by one": seconds["one by one"],
        "batch": attention + work * remaining + outside,
        "padded": attention * len(joint) * max(joint) ** 2 / sum(n * n for n in joint) + padding * remaining + outside,
    }
    return [
        which(case, pipe.transformer)
        | {
            "rows": "+".join(map(str, rows)), "method": name, "rounds": len(values), "gate": "pass",
            "seconds_median": seconds[name], "seconds_min": min(values), "seconds_max": max(values),
            "bound_seconds": bounds[name], "measured_over_bound": bounds[name] / seconds[name],
            "speedup_over_one_by_one": seconds["one by one"] / seconds[name],
            "speedup_over_padded": seconds["padded"] / seconds[name],
        }
        for name, values in runs.total.items()
    ]  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The methods of one case as text."""
    head = rows[0]
    lines = [f"references {head['references']}, rows {head['rows']}"]
    lines.append(f"{'method':<12}{'seconds':>9}  {'min-max':<16}{'x one by one':>13}{'x padded':>10}{'of bound':>10}")
    for row in rows:
        spread = f"{row['seconds_min']:.2f}-{row['seconds_max']:.2f}"
        lines.append(
            f"{row['method']:<12}{row['seconds_median']:>9.2f}  {spread:<16}{row['speedup_over_one_by_one']:>13.2f}"
            f"{row['speedup_over_padded']:>10.2f}{row['measured_over_bound']:>10.2f}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and what to change in its case."""
    parser.add_argument("--model", choices=[case.model.model for case in CASES], help="only this model")
    add_cuts(parser)
    add_shared(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Every case; the exit code."""
    device = prepare(options)
    output = Output(options, "batch", COLUMNS)
    for case in CASES:
        if options.model not in (None, case.model.model):
            continue
        (model,) = changed([case.model], options)
        scale = case.model.side / model.side
        case = BatchCase(model, tuple(tuple(int(side / scale) for side in sides) for sides in case.references))
        if output.has(**which(case, transformer_of(model))):
            continue
        print(f"{model.model}, {options.dtype} on {options.device}", flush=True)
        rows = bench(case, device, getattr(torch, options.dtype))
        print(table(rows), flush=True)
        output.add(rows)
    return output.verdict()

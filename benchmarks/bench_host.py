"""What the library itself costs the CPU in a step, apart from the model: no GPU can run ahead of less.

    python -m benchmarks host             # FLUX.1 Kontext's 19 + 38 blocks, rows appended to results/host_cpu.csv

The transformer has its published depth and almost no width, one reference and few tokens, so that kernels take next to
nothing. Each step of a patched run is followed by an unpatched one on the same rows: all of them for a full step, those
that are left for a sparse one, text and generation for a cached one, which reads stored rows besides. A row is the
median of the differences, in milliseconds of CPU time of the thread (``time.thread_time``), so that other work on the
machine counts as little as can be; PyTorch runs one thread. Stored rows are copied by operations that are counted too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import diffusers
import torch

import sparse_ref_attn as sra
from sparse_ref_attn.models import adapter_for, named_model
from sparse_ref_attn.packing import kept_rows
from sparse_ref_attn.types import TokenLayout

from .options import Output, add_shared, prepare
from .results import ENVIRONMENT

__all__ = ["COLUMNS", "METHODS", "add_arguments", "bench", "run"]

COLUMNS = (
    *ENVIRONMENT, "model", "depth", "width", "generation", "reference", "method", "step", "samples",
    "cpu_ms_unpatched", "cpu_ms_of_library", "quarter", "three_quarters",
)  # fmt: skip

_ONCE = sra.Never()
METHODS: dict[str, sra.SparseRef] = {
    "every token": sra.SparseRef("grid", 1.0),
    "tokens 25%": sra.SparseRef("grid", 0.25),
    "stored": sra.SparseRef("grid", 1.0, execute=sra.Cache(refresh=_ONCE)),
    "stored, 25% read": sra.SparseRef("grid", 0.25, execute=sra.Cache(refresh=_ONCE)),
    "stored, 25% read, by layer": sra.SparseRef("grid", 0.25, execute=sra.Cache(refresh=_ONCE, layers=(0.5,) * 57)),
    "stored, 25% read per tile": sra.SparseRef("mass", 0.25, execute=sra.Cache(refresh=_ONCE, per="tile")),
}
SIDE, TEXT, STEPS = 8, 16, 8
WIDTH = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 32,
         "pooled_projection_dim": 32}  # fmt: skip


def arguments(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Of one call with a reference of the picture's size."""
    ids = [torch.cartesian_prod(torch.tensor([frame]), *(torch.arange(float(SIDE)),) * 2) for frame in (0.0, 1.0)]
    given = {
        "hidden_states": torch.randn(1, 2 * SIDE**2, 64), "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "pooled_projections": torch.randn(1, 32), "guidance": torch.ones(1),
    }  # fmt: skip
    tables = {"img_ids": torch.cat(ids), "txt_ids": torch.zeros(TEXT, 3)}
    return {name: x.to(device, dtype) for name, x in given.items()} | {n: x.to(device) for n, x in tables.items()}


def bench(blocks: int | None, rounds: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each method and kind of step."""
    torch.manual_seed(0)
    cuts = {} if blocks is None else {"num_layers": blocks, "num_single_layers": blocks}
    transformer = named_model("kontext", device=device, dtype=dtype, **WIDTH, **cuts)
    kwargs, config = arguments(device, dtype), transformer.config
    about = {
        "model": "kontext", "depth": f"{config.num_layers}+{config.num_single_layers}",
        "width": config.num_attention_heads * config.attention_head_dim, "generation": SIDE**2, "reference": SIDE**2,
    }  # fmt: skip
    depth = config.num_layers + config.num_single_layers
    rows = []
    for name, method in METHODS.items():
        if method.layers is not None:
            method = sra.SparseRef("grid", 0.25, execute=sra.Cache(refresh=_ONCE, layers=(0.5,) * depth))
        samples: dict[str, list[tuple[float, float]]] = {}
        for turn in range(rounds + 1):  # the first warms up
            found = one_run(transformer, kwargs, method)
            for kind, pair in found if turn else ():
                samples.setdefault(kind, []).append(pair)
        rows += [about | {"method": name, "step": kind} | row(pairs) for kind, pairs in samples.items()]
    return rows


def one_run(
    transformer: Any, kwargs: Mapping[str, Any], method: sra.SparseRef
) -> list[tuple[str, tuple[float, float]]]:
    """Of each step of a pipeline's loop its kind, and CPU seconds with the patch and, on the same rows, without."""
    scheduler, found, latents = diffusers.FlowMatchEulerDiscreteScheduler(), [], kwargs["hidden_states"]
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxKontextPipeline(scheduler=scheduler, transformer=transformer, **parts)
    with sra.patched(pipe, method) as handle:
        scheduler.set_timesteps(STEPS)
        for now in scheduler.timesteps:
            given = {**kwargs, "timestep": (now / 1000).expand(1).to(latents)}
            took = _cpu_seconds(transformer, given)
            record = handle.record.steps[-1]
            with handle._generations.resting():
                plain = _cpu_seconds(transformer, _same_rows(transformer, given, record, handle.record.layout))
            found.append((record.kind, (took, plain)))
            scheduler.step(latents, now, latents)
    return found


def _same_rows(transformer: Any, kwargs: Mapping[str, Any], step: Any, layout: TokenLayout) -> Mapping[str, Any]:
    """The arguments of a call with the rows that a step ran."""
    if step.kind == "cached":
        return adapter_for(transformer).drop(dict(kwargs), layout, torch.arange(layout.generation[1]))
    if step.kind == "sparse":
        return adapter_for(transformer).drop(dict(kwargs), layout, kept_rows(layout, step.selection))
    return kwargs


def _cpu_seconds(transformer: Any, kwargs: Mapping[str, Any]) -> float:
    began = time.thread_time()
    transformer(**kwargs)
    return time.thread_time() - began


def row(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Milliseconds."""
    own = [1000 * (took - plain) for took, plain in pairs]
    low, _, high = quantiles(own, n=4) if len(own) > 1 else own * 3
    return {
        "samples": len(own), "cpu_ms_unpatched": 1000 * median(plain for _, plain in pairs),
        "cpu_ms_of_library": median(own), "quarter": low, "three_quarters": high,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How deep the model is."""
    parser.add_argument("--blocks", type=int, metavar="N", help="blocks of each kind instead of the published model's")
    add_shared(parser, dtype="float32")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Every method; the exit code."""
    device = prepare(options)
    torch.set_num_threads(1)
    blocks = 1 if options.quick and options.blocks is None else options.blocks
    rounds = options.rounds or (2 if options.quick else 20)
    output = Output(options, "host", COLUMNS)
    rows = bench(blocks, rounds, device, getattr(torch, options.dtype))
    print(f"{'method':<28}{'step':<10}{'samples':>8}{'unpatched ms':>14}{'library ms':>12}{'middle half':>16}")
    for each in rows:
        half = f"{each['quarter']:.2f} to {each['three_quarters']:.2f}"
        print(
            f"{each['method']:<28}{each['step']:<10}{each['samples']:>8}{each['cpu_ms_unpatched']:>14.2f}"
            f"{each['cpu_ms_of_library']:>12.2f}{half:>16}"
        )
    output.add(rows)
    return output.verdict()

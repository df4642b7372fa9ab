"""One part of `first`, in a process of its own: ``python -m benchmarks.first_child PART --lines FILE``."""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import results
from .lines import Lines
from .op_shapes import MODELS, OpShape

__all__ = ["main"]

PARTS = ("environment", "outputs", "times", "gathers", "launches")


def main(arguments: list[str] | None = None) -> int:
    """Run one part; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=PARTS)
    parser.add_argument("--lines", type=Path, required=True, help="JSON lines are appended to it")
    parser.add_argument("--part", help="the name that stands in every line")
    parser.add_argument("--cut", action="store_true", help="on a CPU, cut small")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.cut else "cuda")
    here = results.environment(device)
    common = {"commit": here["commit"], "device": here["device"], "cut": options.cut}
    lines = Lines(options.lines, **common, part=options.part or options.what)
    # the interpreter's bfloat16 is wrong unless the tests mend it
    dtype = torch.float16 if options.cut else torch.bfloat16
    shape = MODELS["kontext"]
    if options.cut:
        shape = replace(shape, heads=1, channels=32, text=8, image=56)
    return _part(options.what, lines, device, dtype, shape, options.cut)


def _part(what: str, lines: Lines, device: torch.device, dtype: torch.dtype, shape: OpShape, cut: bool) -> int:
    from . import first_checks, first_times

    if what == "environment":
        return _environment(lines, device)
    if what == "outputs":
        return first_checks.outputs(lines, device, dtype, shape, repeats=2 if cut else first_checks.REPEATS)
    if what == "times":
        return first_times.times(lines, device, dtype, shape, rounds=1 if cut else 30)
    if what == "gathers":
        return first_checks.gathers(lines, device, dtype)
    return first_checks.launches(lines, device, dtype, shape)


def _environment(lines: Lines, device: torch.device) -> int:
    """Versions, the card, and who can compute what on it."""
    from sparse_ref_attn.ops.gather_attention.backends import Call, explain
    from sparse_ref_attn.ops.shared import cuda_launch

    installed = {}
    for package in ("torch", "triton", "numpy", "flash-attn", "flash-attn-3", "flashinfer-python"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    lines.add(**results.provenance(device, "both"), platform=platform.platform(), packages=installed)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        lines.add(
            capability=f"{card.major}.{card.minor}", multiprocessors=card.multi_processor_count,
            memory_gib=round(card.total_memory / 2**30, 1), cuda_kernels=cuda_launch.against(device) or "can run",
        )  # fmt: skip
    for backend, why in explain(Call(device, torch.bfloat16, 128)).items():
        lines.add(backend=backend, can=not why, why=why)
    return 0


if __name__ == "__main__":
    sys.exit(main())

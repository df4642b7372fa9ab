"""Times every candidate configuration of the attention and mass kernels on this card, and prints rows for the tables.

    python -m benchmarks tune                       # head dims 128, 64, 32 at Kontext's shape, all kernels
    python -m benchmarks tune --channels 128 --kernels forward --rounds 20

The tables are ``tuning.py`` of gather_attention and of attention_mass. A candidate that does not fit the card is passed
over; one that gives another result than the table's own configuration stops the sweep. Every time goes to
``results/tune_<device>.csv``; ``of_table`` is the table's own time over the candidate's. With
``TRITON_INTERPRET=1`` in the environment it also runs on a CPU, which shows that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import product
from statistics import median

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sparse_ref_attn.ops.attention_mass.impl.triton_mass import launch_lse, launch_mass
from sparse_ref_attn.ops.attention_mass.impl.triton_tile_mass import launch_tile_mass
from sparse_ref_attn.ops.attention_mass.impl.tuning import LSE, MASS, TILE_MASS
from sparse_ref_attn.ops.gather_attention.arguments import Arguments
from sparse_ref_attn.ops.gather_attention.impl.triton_forward import launch_forward
from sparse_ref_attn.ops.gather_attention.impl.triton_grad_kv import launch_grad_kv_gathered
from sparse_ref_attn.ops.gather_attention.impl.triton_grad_q import launch_delta, launch_grad_q
from sparse_ref_attn.ops.gather_attention.impl.triton_tiles import launch_tiles
from sparse_ref_attn.ops.gather_attention.impl.tuning import FORWARD, GRAD_KV, GRAD_Q, TILES
from sparse_ref_attn.ops.gather_attention.normal_form import normalise
from sparse_ref_attn.ops.shared.launch_config import Config, capability_of, config_for

from .op_timing import measure
from .options import Output, add_shared, prepare
from .results import ENVIRONMENT

__all__ = ["COLUMNS", "add_arguments", "candidates", "kernels", "operands", "run", "sweep"]

COLUMNS = (
    *ENVIRONMENT, "kernel", "capability", "heads", "channels", "queries", "kept", "config", "ms_median", "tflops",
    "of_table",
)  # fmt: skip

BLOCKS = {"tiles of 16": 16, "tiles of 64": 64}  # queries of a block, and of each tile here
MASSES = ("mass", "mass per tile")  # tiles of 16 queries
TABLES = {
    "forward": FORWARD, "grad_q": GRAD_Q, "grad_kv": GRAD_KV, "lse": LSE, "mass": MASS, "mass per tile": TILE_MASS,
    **{kernel: TILES[block] for kernel, block in BLOCKS.items()},
}  # fmt: skip
# Products of queries and keys.
PRODUCTS = {
    "forward": 2, "grad_q": 3, "grad_kv": 4, "lse": 1, **dict.fromkeys(MASSES, 1), **dict.fromkeys(BLOCKS, 2),
}  # fmt: skip
CELL = 16  # rows of the bank for one mean, where tiles select

Launch = Callable[[Config], "tuple[Tensor, ...]"]


def candidates(kernel: str) -> list[Config]:
    """What is worth trying: tiles that the tensor cores take, with and without the unmasked loop."""
    rows, columns = ((64, 128), (32, 64, 128)) if kernel != "grad_kv" else ((32, 64, 128), (64, 128))
    if kernel in BLOCKS:
        rows, columns = (BLOCKS[kernel],), (32, 64, 128)
    splits = (True, False) if kernel in ("forward", "grad_q", *BLOCKS) else (True,)
    return [Config(*each) for each in product(rows, columns, (4, 8), (2, 3, 4), splits)]


def operands(
    queries: int, kept: int, bank: int, heads: int, channels: int, device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> Arguments:  # fmt: skip
    """One item: as many dense keys as queries, and `kept` random rows of the bank."""
    torch.manual_seed(0)
    shape = (heads, channels)
    q, k, v = (torch.randn(queries, *shape, device=device, dtype=dtype) for _ in range(3))
    k_ref, v_ref = (torch.randn(bank, *shape, device=device, dtype=dtype) for _ in range(2))
    rows = torch.randperm(bank)[:kept].sort().values.int().to(device)
    return normalise(q, k, v, None, None, k_ref, v_ref, rows, None, None, None, None, True)


def tiled(a: Arguments, tile: int) -> Arguments:
    """The same in tiles of so many queries: each keeps as many rows as `a` does, and there are means of the bank."""
    assert a.k_ref is not None
    assert a.v_ref is not None
    assert a.ref_indices is not None
    edges = torch.tensor([*range(0, a.q.shape[0], tile), a.q.shape[0]], dtype=torch.int32)
    tiles, bank, device = edges.shape[0] - 1, a.k_ref.shape[0], a.q.device
    rows = torch.stack([torch.randperm(bank)[: a.ref_indices.shape[0]] for _ in range(tiles)]).int().to(device)
    k2, v2 = a.k_ref[: -(-bank // CELL)], a.v_ref[: -(-bank // CELL)]
    bias = torch.zeros(tiles, k2.shape[0], device=device)
    operands = a.q, a.k, a.v, k2, v2, a.k_ref, a.v_ref
    return normalise(*operands, rows, None, None, None, None, True, None, edges.to(device), bias)


def kernels(a: Arguments, base: Config) -> dict[str, Launch]:
    """Each kernel as a function of its configuration, on the results of a forward pass."""
    assert a.k is not None
    assert a.k_ref is not None
    of_tiles = {kernel: _tiles(tiled(a, block), base) for kernel, block in BLOCKS.items()}
    out, lse = launch_forward(a, base)
    grad = torch.randn_like(out)
    delta = launch_delta(out, grad, None)
    rows = a.q.shape[0]
    tiles = torch.tensor([*range(0, rows, 16), rows], dtype=torch.int32, device=a.q.device)
    return {
        "forward": lambda config: launch_forward(a, config),
        "grad_q": lambda config: (launch_grad_q(a, grad, lse, delta, config),),
        "grad_kv": lambda config: launch_grad_kv_gathered(a, grad, lse, delta, config),
        "lse": lambda config: (launch_lse(a.q[None], a.k[None], a.scale, 1, config),),
        "mass": lambda config: (launch_mass(a.q[None], a.k_ref[None], lse[None], a.scale, 1, config),),
        "mass per tile": lambda config: (
            launch_tile_mass(a.q[None], a.k_ref[None], lse[None], tiles, a.scale, True, config),
        ),
        **of_tiles,
    }


def _tiles(a: Arguments, base: Config) -> Launch:
    assert a.shared is not None
    out, lse = launch_forward(a.shared, base, torch.float32)
    return lambda config: (launch_tiles(a, out, lse.clone(), config),)


def sweep(
    launch: Launch, base: Config, tried: Iterable[Config], device: torch.device, rounds: int
) -> list[tuple[float, Config]]:
    """Milliseconds and configuration, fastest first, of every candidate that fits the card."""
    want = launch(base)
    runs: dict[Config, Callable[[], object]] = {}
    for config in tried:
        try:
            got = launch(config)
        except OutOfResources:
            continue
        for one, expected in zip(got, want, strict=True):
            size = expected.float().abs().mean()  # a mass is a small number
            torch.testing.assert_close(one.float() / size, expected.float() / size, rtol=2e-2, atol=2e-2)
        runs[config] = lambda config=config: launch(config)
    times = measure({str(c): f for c, f in runs.items()}, device, rounds)
    return sorted((median(times[str(config)]), config) for config in runs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The kernels, their shape, and how much is tried."""
    parser.add_argument("--channels", nargs="+", type=int, default=[128, 64, 32])
    parser.add_argument("--kernels", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--queries", type=int, default=4608)
    parser.add_argument("--kept", type=int, default=1024)
    parser.add_argument("--bank", type=int, default=4096, help="reference tokens (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--candidates", type=int, metavar="N", help="only the first N")
    add_shared(parser, dtype="bfloat16")
    parser.set_defaults(run=run, device="cuda")


def run(options: argparse.Namespace) -> int:
    """Every kernel at every head dim; the exit code."""
    device = prepare(options)
    output = Output(options, "tune", COLUMNS)
    capability = capability_of(torch.empty(0, device=device))
    dtype = getattr(torch, options.dtype)
    for channels in options.channels:
        a = operands(options.queries, options.kept, options.bank, options.heads, channels, device, dtype)
        launches = kernels(a, config_for(FORWARD, capability, channels))
        for kernel in options.kernels:
            which = {
                "kernel": kernel, "capability": capability, "heads": options.heads, "channels": channels,
                "queries": options.queries, "kept": options.kept,
            }  # fmt: skip
            if output.has(**which):
                continue
            base = config_for(TABLES[kernel], capability, channels)
            tried = {base, *candidates(kernel)[: options.candidates]}
            found = sweep(launches[kernel], base, tried, device, options.rounds or 10)
            # dk/dv of the gathered rows alone, the LSE over the dense keys, the masses of the whole bank
            keys = {"grad_kv": options.kept, "lse": options.queries} | dict.fromkeys(MASSES, options.bank)
            keys |= dict.fromkeys(BLOCKS, options.kept + -(-options.bank // CELL))
            pairs = options.queries * keys.get(kernel, options.queries + options.kept)
            flops = PRODUCTS[kernel] * 2.0 * pairs * options.heads * channels
            own = next(ms for ms, config in found if config == base)
            output.add(
                [
                    which | {"config": str(c), "ms_median": ms, "tflops": flops / ms / 1e9, "of_table": own / ms}
                    for ms, c in found
                ]
            )
            for ms, config in found[:3]:
                mark = "  (the table's)" if config == base else ""
                print(
                    f"{kernel} ({capability}, {channels}): {config}  # {ms:.3f} ms, {flops / ms / 1e9:.0f} TF/s{mark}"
                )
    return output.verdict()

"""Every configuration of the Triton kernels, compiled for cards that are not there, and what the compiler made of it.

    python -m benchmarks configurations            # compiles the tables' rows and prints their figures
    python -m benchmarks configurations --write    # and writes results/configurations.csv and its page

No card is needed, only Triton. The tables are ``tuning.py`` of gather_attention and of attention_mass; the rows are on
the page docs/configurations.md, which says what was chosen by which figure. The tests hold the page to the rows, the
rows to the compiler, and every launch to `faults`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from sparse_ref_attn.ops.attention_mass.impl.triton_mass import launch_lse, launch_mass
from sparse_ref_attn.ops.attention_mass.impl.triton_tile_mass import launch_parts
from sparse_ref_attn.ops.attention_mass.impl.tuning import LSE, MASS, TILE_MASS
from sparse_ref_attn.ops.gather_attention.arguments import Arguments
from sparse_ref_attn.ops.gather_attention.impl.triton_forward import launch_forward
from sparse_ref_attn.ops.gather_attention.impl.triton_grad_kv import launch_grad_kv, launch_grad_kv_gathered
from sparse_ref_attn.ops.gather_attention.impl.triton_grad_q import launch_grad_q
from sparse_ref_attn.ops.gather_attention.impl.triton_tiles import launch_tiles
from sparse_ref_attn.ops.gather_attention.impl.tuning import FORWARD, GRAD_KV, GRAD_Q, TILES
from sparse_ref_attn.ops.shared.launch_config import Config, Table

from . import results
from .aot import Launch, compiled_for

__all__ = [
    "CALLS", "CARDS", "COLUMNS", "KERNELS", "PATH", "add_arguments", "arguments", "compiled", "faults", "hold",
    "launches", "row", "run",
]  # fmt: skip

PATH = results.RESULTS / "configurations.csv"
COLUMNS = (
    "card", "kernel", "channels", "config", "registers", "stack", "shared", "programs", "steps", "matrix", "fences",
    "copies", "triton",
)  # fmt: skip
CARDS = {80: "sm_80", 90: "sm_90", 100: "sm_100"}
CHANNELS = (128, 64, 32)
HEADS = 24

#: Name -> the table that has its configuration.
KERNELS: dict[str, Table] = {
    "forward": FORWARD, "grad_q": GRAD_Q, "grad_kv dense": GRAD_KV, "grad_kv gathered": GRAD_KV, "lse": LSE,
    "mass": MASS, "mass per tile": TILE_MASS, "tiles of 16": TILES[16], "tiles of 64": TILES[64],
}  # fmt: skip

#: What else `arguments` are: Kontext's tiles.
CALLS = {"tiles of 16": {"tiles": 257}, "tiles of 64": {"tiles": 65}}
NARROW = "tiles of 16"
SPLIT = ("forward", "grad_q", *CALLS)

#: sm_80's rows also serve 86, 89 and 120, where a program has 99 KiB.
SHARED_AT_MOST = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC.*MMA", "gfx942": "v_mfma"}


def arguments(
    channels: int,
    *,
    items: int = 4,
    parts: int = 1,
    tiles: int = 0,
    dense: bool = True,
    gathered: bool = True,
    row: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Arguments:
    """Meta tensors at FLUX sizes, 24 heads; `row` is the stride between rows where it is not heads x channels.

    With so many query `tiles`, 256 means of cells too.
    """

    def tensor(rows: int) -> Tensor:
        x = torch.empty(rows, row or HEADS * channels, dtype=dtype, device="meta")
        return x[:, : HEADS * channels].unflatten(1, (HEADS, channels))

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    k = tensor(4608) if dense else None
    bank = tensor(4096) if gathered else None
    offsets = integers(parts, items + 1)
    a = Arguments(
        tensor(4608), k, k, None, None, bank, bank, offsets, offsets if dense else None,
        integers(2048) if gathered else None, integers(1, (tiles or items) + 1) if gathered else None,
        channels**-0.5, False,
    )  # fmt: skip
    if not tiles:
        return a
    bias, means = torch.empty(tiles, 256, device="meta"), tensor(256) if dense else None
    return a._replace(
        k2=means, v2=means, cu_seqlens_k=integers(2, items + 1) if dense else None, cu_tiles=integers(tiles + 1),
        bias=bias if dense else None,
    )  # fmt: skip


def launches(a: Arguments, config: Config) -> dict[str, Callable[[], object]]:
    """Each kernel's launch in one configuration; those that `a` has no keys for are left out."""
    rows = torch.empty(HEADS, a.q.shape[0], device="meta")
    q, tiles = a.q[None], torch.empty(a.q.shape[0] // 16 + 1, dtype=torch.int32, device="meta")
    out: dict[str, Callable[[], object]] = {
        "forward": lambda: launch_forward(a, config),
        "grad_q": lambda: launch_grad_q(a, a.q, rows, rows, config),
        "lse": lambda: launch_lse(q, q, a.scale, 1, config),
        "mass": lambda: launch_mass(q, q, rows[None], a.scale, 1, config),
        "mass per tile": lambda: launch_parts(q, q, rows[None], tiles, a.scale, True, config),
    }
    if a.k is not None and a.v is not None and a.cu_seqlens_k is not None:
        k, v, cu = a.k, a.v, a.cu_seqlens_k
        out["grad_kv dense"] = lambda: launch_grad_kv(a, k, v, cu, a.q, rows, rows, config)
    if a.cu_tiles is not None:
        shared = torch.empty(a.q.shape, device="meta") if a.shared is not None else None
        return {f"tiles of {config.block_m}": lambda: launch_tiles(a, shared, rows, config)}
    if a.k_ref is not None:
        out["grad_kv gathered"] = lambda: launch_grad_kv_gathered(a, a.q, rows, rows, config)
    return out


def compiled(card: str, launch: Callable[[], object]) -> Launch:
    """What the compiler made of the last kernel that `launch` starts."""
    with compiled_for(card) as seen:
        launch()
    return seen[-1]


def faults(seen: Launch, kernel: str = "") -> list[str]:
    """What is wrong with a compiled kernel, in words; empty where nothing is.

    A block of 16 queries fills Ampere's matrix instruction and no other, so every card of NVIDIA's has that one there.
    """
    card, found = seen.card, []
    narrow = kernel == NARROW and card.startswith("sm_")
    matrix = MATRIX["sm_80" if narrow else card]
    if seen.stack:
        found.append(f"spills: {seen.stack} bytes of stack a thread")
    if seen.shared > SHARED_AT_MOST[card]:
        found.append(f"{seen.shared} bytes of shared memory, {SHARED_AT_MOST[card]} are allowed")
    if not seen.count(matrix):
        found.append(f"no matrix instruction ({matrix})")
    if seen.serialized():
        found.append(f"serialized: {seen.count('WARPGROUP.ARRIVE')} fences for {seen.count('HGMMA')} HGMMA")
    if not card.startswith("sm_"):
        return found
    if seen.programs() < 1:
        found.append("no program fits on a multiprocessor")
    if not seen.count(r"LDGSTS.*\.128"):
        found.append("no asynchronous copy of 16 bytes")
    if seen.count(r"LDGSTS") - seen.count(r"LDGSTS.*\.128") > 8:  # lse and delta
        found.append("asynchronous copies of less than 16 bytes")
    if seen.count(r"LDG\..*U16"):
        found.append("loads of 2 bytes")
    return found if narrow else found + _narrow(seen)


#: The least rows and columns of a matrix step. Hopper's n = 32 takes its operands from shared memory at 192 bytes a
#: clock, of which there are 128; n = 64 just fills them. Blackwell works at half its rate below 128 rows.
LEAST = {"sm_90": (64, 32), "sm_100": (64, 32)}


def _narrow(seen: Launch) -> list[str]:
    rows, columns = LEAST.get(seen.card, (0, 0))
    steps = [tuple(map(int, shape.split("x"))) for shape in seen.steps]
    return [f"matrix steps of {m}x{n}x{k}" for m, n, k in steps if m < rows or n < columns]


def row(card: str, kernel: str, channels: int, config: Config, seen: Launch) -> dict[str, Any]:
    """The figures of one launch, as `COLUMNS` has them."""
    steps = sorted(seen.steps, key=lambda shape: [int(n) for n in shape.split("x")])
    return {
        "card": card, "kernel": kernel, "channels": channels,
        "config": f"{config.block_m} x {config.block_n}, {config.warps} warps, {config.stages} stages"
        + (", split" if config.split and kernel in SPLIT else ""),
        "registers": seen.registers, "stack": seen.stack, "shared": seen.shared, "programs": seen.programs(),
        "steps": " ".join(steps), "matrix": sum(seen.steps.values()), "fences": seen.count("WARPGROUP.ARRIVE"),
        "copies": seen.count(r"LDGSTS.*\.128"), "triton": triton.__version__,
    }  # fmt: skip


def hold(card: str, kernel: str, channels: int, config: Config, seen: Launch) -> None:
    """Compare a launch with its row on the page.

    Raises
    ------
    AssertionError
        If the row says something else. Registers and instructions are compared for the row's Triton alone, since
        another one brings another ptxas; the configuration always.
    """
    now = {name: str(value) for name, value in row(card, kernel, channels, config, seen).items()}
    which = ("card", "kernel", "channels")
    (kept,) = (r for r in results.read(PATH) if all(r[name] == now[name] for name in which))
    names = COLUMNS if kept["triton"] == now["triton"] else ("config", "stack")
    differ = {name: (kept[name], now[name]) for name in names if kept[name] != now[name]}
    assert not differ, f"run python -m benchmarks configurations --write: (page, compiler) {differ}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cards, and whether the rows are kept."""
    parser.add_argument("--cards", nargs="+", choices=list(CARDS.values()), default=list(CARDS.values()))
    parser.add_argument("--write", action="store_true", help=f"write {PATH.name} and docs/configurations.md anew")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compile every row; 1 where one has a fault."""
    found, bad = [], 0
    for card, kernel, channels, config in _table(options.cards):
        seen = compiled(card, launches(arguments(channels, **CALLS.get(kernel, {})), config)[kernel])
        found.append(row(card, kernel, channels, config, seen))
        why = faults(seen, kernel)
        bad += bool(why)
        print("  ".join(str(value) for value in found[-1].values()), *why, sep="  ", flush=True)
    if options.write:
        _write(found, PATH)
    return int(bad > 0)


def _table(cards: Sequence[str]) -> Iterator[tuple[str, str, int, Config]]:
    for capability, card in CARDS.items():
        if card in cards:
            for kernel, table in KERNELS.items():
                for channels in CHANNELS:
                    yield card, kernel, channels, table[capability, channels]


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    from . import tables

    path.unlink(missing_ok=True)
    results.append(rows, path, COLUMNS)
    tables.write("docs/configurations.md")

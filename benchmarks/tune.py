"""Times every candidate configuration of the attention and mass kernels on this card, and prints rows for the tables.

    python -m benchmarks.tune                       # head dims 128, 64, 32 at Kontext's shape, all kernels
    python -m benchmarks.tune --channels 128 --kernels forward --rounds 20

The tables are ``tuning.py`` of gather_attention and of attention_mass. A candidate that does not fit the card is passed
over; one that gives another result than the table's own configuration stops the sweep. Not yet run on a card.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import product
from statistics import median

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sparse_ref_attn.ops._tuning import Config, config_for
from sparse_ref_attn.ops.attention_mass.triton_mass import launch_lse, launch_mass
from sparse_ref_attn.ops.attention_mass.tuning import LSE, MASS
from sparse_ref_attn.ops.gather_attention.arguments import Arguments
from sparse_ref_attn.ops.gather_attention.normal_form import normalise
from sparse_ref_attn.ops.gather_attention.triton_forward import launch_forward
from sparse_ref_attn.ops.gather_attention.triton_grad_kv import launch_grad_kv_gathered
from sparse_ref_attn.ops.gather_attention.triton_grad_q import launch_delta, launch_grad_q
from sparse_ref_attn.ops.gather_attention.tuning import FORWARD, GRAD_KV, GRAD_Q

from .bench_ops import measure

__all__ = ["candidates", "kernels", "operands", "sweep"]

TABLES = {"forward": FORWARD, "grad_q": GRAD_Q, "grad_kv": GRAD_KV, "lse": LSE, "mass": MASS}
PRODUCTS = {"forward": 2, "grad_q": 3, "grad_kv": 4, "lse": 1, "mass": 1}  # of queries and keys

BANK = 4096  # reference tokens

Launch = Callable[[Config], "tuple[Tensor, ...]"]


def candidates(kernel: str) -> list[Config]:
    """What is worth trying: tiles that the tensor cores take, with and without the unmasked loop."""
    rows, columns = ((64, 128), (32, 64, 128)) if kernel != "grad_kv" else ((32, 64, 128), (64, 128))
    splits = (True, False) if kernel in ("forward", "grad_q") else (True,)
    return [Config(*each) for each in product(rows, columns, (4, 8), (2, 3, 4), splits)]


def operands(queries: int, kept: int, bank: int, heads: int, channels: int, device: torch.device) -> Arguments:
    """One item: as many dense keys as queries, and `kept` random rows of the bank."""
    torch.manual_seed(0)
    shape = (heads, channels)
    q, k, v = (torch.randn(queries, *shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    k_ref, v_ref = (torch.randn(bank, *shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    rows = torch.randperm(bank)[:kept].sort().values.int().to(device)
    return normalise(q, k, v, None, None, k_ref, v_ref, rows, None, None, None, None, True)


def kernels(a: Arguments, base: Config) -> dict[str, Launch]:
    """Each kernel as a function of its configuration, on the results of a forward pass."""
    assert a.k is not None
    assert a.k_ref is not None
    out, lse = launch_forward(a, base)
    grad = torch.randn_like(out)
    delta = launch_delta(out, grad, None)
    return {
        "forward": lambda config: launch_forward(a, config),
        "grad_q": lambda config: (launch_grad_q(a, grad, lse, delta, config),),
        "grad_kv": lambda config: launch_grad_kv_gathered(a, grad, lse, delta, config),
        "lse": lambda config: (launch_lse(a.q[None], a.k[None], a.scale, 1, config),),
        "mass": lambda config: (launch_mass(a.q[None], a.k_ref[None], lse[None], a.scale, 1, config),),
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", nargs="+", type=int, default=[128, 64, 32])
    parser.add_argument("--kernels", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--queries", type=int, default=4608)
    parser.add_argument("--kept", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=10)
    o = parser.parse_args()
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    print(f"{torch.cuda.get_device_name(device)}, capability {capability}, torch {torch.__version__}")
    for channels in o.channels:
        a = operands(o.queries, o.kept, BANK, o.heads, channels, device)
        launches = kernels(a, config_for(FORWARD, capability, channels))
        for kernel in o.kernels:
            base = config_for(TABLES[kernel], capability, channels)
            found = sweep(launches[kernel], base, {base, *candidates(kernel)}, device, o.rounds)
            # dk/dv of the gathered rows alone, the LSE over the dense keys, the mass of the whole bank
            keys = {"grad_kv": o.kept, "lse": o.queries, "mass": BANK}.get(kernel, o.queries + o.kept)
            flops = PRODUCTS[kernel] * 2.0 * o.queries * keys * o.heads * channels
            for ms, config in found[:3]:
                mark = "  (the table's)" if config == base else ""
                print(
                    f"{kernel} ({capability}, {channels}): {config}  # {ms:.3f} ms, {flops / ms / 1e9:.0f} TF/s{mark}"
                )


if __name__ == "__main__":
    main()

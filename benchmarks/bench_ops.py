"""gather_attention and attention_mass at the shapes of real models, beside what one would do without them.

    python -m benchmarks.bench_ops                            # this machine's CPU, rows appended to results/
    python -m benchmarks.bench_ops --quick                    # seconds: shows that it runs, writes no rows
    python -m benchmarks.bench_ops --device cuda --dtype bfloat16 --references 1 2 4 --backward

A method is timed only after its gate: no further from float64 than twice the error of plain PyTorch in the same
precision, on 64 queries. All methods run in turn, round after round, each after a write that clears the cache.

Columns of a row: where and when (date, commit, device, torch, threads, dtype), the call (model, references, kept share,
kept tokens, op, direction), the method, milliseconds (median, min, max, rounds), TFLOP/s, ``of_bound`` (the dense
kernel's time scaled by the keys that are left, over this time) and ``of_hand`` (index_select and SDPA by hand, over
this time). Rivals that are not installed, or cannot do the call, are named with their reason and skipped.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparse_ref_attn.errors import ConfigError
from sparse_ref_attn.functional import attention_mass, gather_attention

from . import results
from .op_shapes import MODELS, OpShape, quick

__all__ = ["Call", "measure", "methods"]

COLUMNS = (
    "date", "commit", "device", "torch", "threads", "dtype", "model", "references", "share", "kept", "op", "direction",
    "method", "ms_median", "ms_min", "ms_max", "rounds", "tflops", "of_bound", "of_hand",
)  # fmt: skip
GATED = 64  # queries whose float64 truth is computed


class Call:
    """Operands of one shape: q, k, v (1, N, H, C), the bank (R, H, C), kept rows."""

    def __init__(self, shape: OpShape, share: float, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

        n, r, h, c = shape.queries, shape.bank, shape.heads, shape.channels
        self.shape = shape
        self.q, self.k, self.v = (normal(1, n, h, c) for _ in range(3))
        self.k_ref, self.v_ref = normal(r, h, c), normal(r, h, c)
        self.rows = torch.randperm(r, generator=generator)[: max(1, round(share * r))].sort().values.to(device)
        self.grad = normal(1, n, h, c).detach()

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.q, self.k, self.v, self.k_ref, self.v_ref]

    def joined(self, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (1, H, ., C) with those bank rows after the dense ones, all of them without `rows`."""
        k_ref, v_ref = (
            (self.k_ref, self.v_ref)
            if rows is None
            else (self.k_ref.index_select(0, rows), self.v_ref.index_select(0, rows))
        )
        k, v = torch.cat([self.k, k_ref[None]], 1), torch.cat([self.v, v_ref[None]], 1)
        return self.q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def ours(self, backend: str) -> Tensor:
        """This library, (1, N, H, C)."""
        return gather_attention(
            self.q, self.k, self.v, self.k_ref, self.v_ref, self.rows, backend=backend, distinct=True
        )

    def sdpa(self, rows: Tensor | None, kernel: SDPBackend | None = None) -> Tensor:
        """PyTorch's attention on gathered keys, (1, N, H, C)."""
        context: AbstractContextManager[Any] = nullcontext() if kernel is None else sdpa_kernel(kernel)
        with context:
            return scaled_dot_product_attention(*self.joined(rows)).transpose(1, 2)

    def flash3(self) -> Tensor:
        """FlashAttention-3 on gathered keys."""
        from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

        out = flash_attn_func(*(x.transpose(1, 2) for x in self.joined(self.rows)))
        return out[0] if isinstance(out, tuple) else out

    def flash2(self) -> Tensor:
        """flash-attn 2 on gathered keys."""
        from flash_attn import flash_attn_func

        return flash_attn_func(*(x.transpose(1, 2) for x in self.joined(self.rows)))

    def error(self, out: Tensor, plain: Tensor) -> tuple[float, float]:
        """Distance of the first queries of out and of plain PyTorch from float64."""
        q, k, v = (x.detach().double() for x in self.joined(self.rows))
        scores = q[:, :, :GATED] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        truth = (scores.softmax(-1) @ v).transpose(1, 2)
        return tuple(float((x[:, :GATED].detach().double() - truth).abs().max()) for x in (out, plain))  # type: ignore[return-value]

    def plain(self) -> Tensor:
        """The formula in the operands' precision, for the first queries."""
        q, k, v = (x.detach() for x in self.joined(self.rows))
        return ((q[:, :, :GATED] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def methods(call: Call) -> dict[str, Callable[[], Tensor]]:
    """Ours and its rivals; a rival that is not installed is left out and named."""
    out: dict[str, Callable[[], Tensor]] = {
        "index_select + sdpa": lambda: call.sdpa(call.rows),
        "ours (auto)": lambda: call.ours("auto"),
        "ours (sdpa)": lambda: call.ours("sdpa"),
        "ours (triton)": lambda: call.ours("triton"),
    }
    if call.q.device.type == "cuda":
        out |= {f"ours ({backend})": lambda backend=backend: call.ours(backend) for backend in ("flash", "flex")}
        out["index_select + flash"] = lambda: call.sdpa(call.rows, SDPBackend.FLASH_ATTENTION)
        out["index_select + cudnn"] = lambda: call.sdpa(call.rows, SDPBackend.CUDNN_ATTENTION)
        for package, name, run in (
            ("flash_attn_interface", "index_select + FA3", call.flash3),
            ("flash_attn", "index_select + FA2", call.flash2),
        ):
            if importlib.util.find_spec(package) is None:
                print(f"  {name}: {package} is not installed")
            else:
                out[name] = run
    return out


def refused(call: Call, run: Callable[[], Tensor], plain: Tensor) -> str | None:
    """Why a method is not timed: its gate."""
    try:
        out = run()
    except (ConfigError, RuntimeError) as error:  # a kernel that cannot do the call says so in one of these
        return str(error).splitlines()[0]
    got, low = call.error(out, plain)
    allowed = 2 * low + 2 * torch.finfo(plain.dtype).eps
    return None if got <= allowed else f"error {got:.2e}, plain PyTorch's allows {allowed:.2e}"


def measure(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run in each round, cold cache, one warm-up round; never two of the same in a row."""
    flush = torch.empty(256 << 20 if device.type == "cuda" else 32 << 20, dtype=torch.uint8, device=device)
    out: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            flush.zero_()
            if device.type == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                stop.record()
                torch.cuda.synchronize(device)
                took = start.elapsed_time(stop)
            else:
                begin = time.perf_counter()
                run()
                took = 1000 * (time.perf_counter() - begin)
            if turn:
                out[name].append(took)
    return out


def attention_rows(
    call: Call, share: float, rounds: int, backward: bool, where: dict[str, Any]
) -> list[dict[str, Any]]:
    """Forward, or forward and backward, of every method that passes its gate."""
    shape, device = call.shape, call.q.device
    passed = {}
    with torch.no_grad():
        plain = call.plain()
        for name, run in methods(call).items():
            why = refused(call, run, plain)
            if why is None:
                passed[name] = run
            else:
                print(f"  {name}: {why}")
    passed = {"dense": lambda: call.sdpa(None), **passed}

    def with_backward(run: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(), call.leaves, call.grad)

    kept, rows = call.rows.shape[0], []
    with torch.set_grad_enabled(backward):
        runs = {n: with_backward(f) if backward else f for n, f in passed.items()}
        times = measure(runs, device, rounds)
    dense, hand = median(times["dense"]), median(times["index_select + sdpa"])
    bound = dense * shape.flops(kept) / shape.flops(shape.bank)
    for name, took in times.items():
        ms = median(took)
        flops = shape.flops(shape.bank if name == "dense" else kept) * (3.5 if backward else 1)
        rows.append(
            where
            | _numbers(took)
            | {
                "model": shape.model, "references": shape.references, "share": share, "kept": kept,
                "op": "gather_attention", "direction": "forward + backward" if backward else "forward", "method": name,
                "tflops": flops / ms / 1e9, "of_bound": (dense if name == "dense" else bound) / ms,
                "of_hand": hand / ms,
            }
        )  # fmt: skip
    return rows


def mass_rows(call: Call, rounds: int, where: dict[str, Any]) -> list[dict[str, Any]]:
    """attention_mass of all reference tokens, by backend."""
    shape, device = call.shape, call.q.device
    keys = torch.cat([call.k, call.k_ref[None]], 1).detach()
    span = (shape.queries, shape.queries + shape.bank)
    q = call.q.detach()[:, shape.text :]
    runs: dict[str, Callable[[], object]] = {"ours (auto)": lambda: attention_mass(q, keys, span)}
    runs["ours (auto), every 4th query"] = lambda: attention_mass(q, keys, span, query_stride=4)
    times = measure(runs, device, rounds)
    about = {"model": shape.model, "references": shape.references, "op": "attention_mass", "direction": "forward"}
    return [where | about | _numbers(took) | {"method": name} for name, took in times.items()]


def _numbers(took: list[float]) -> dict[str, Any]:
    return {"ms_median": median(took), "ms_min": min(took), "ms_max": max(took), "rounds": len(took)}


def append(rows: list[dict[str, Any]], path: Path) -> None:
    """Add rows to a CSV file, with a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what the command line asks for; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--models", nargs="+", default=["kontext"], choices=list(MODELS))
    parser.add_argument("--references", nargs="+", type=int, default=[1])
    parser.add_argument("--kept", nargs="+", type=float, default=[0.05, 0.25, 1.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backward", action="store_true", help="time forward and backward together too")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the tokens; writes no rows")
    o = parser.parse_args(arguments)
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    about = results.environment(device)
    where = {k: about[k] for k in ("date", "commit", "device", "torch")}
    where |= {"threads": torch.get_num_threads(), "dtype": o.dtype}
    rows: list[dict[str, Any]] = []
    for model in o.models:
        for references in o.references:
            shape = replace(MODELS[model], references=references)
            shape = quick(shape) if o.quick else shape
            for share in o.kept:
                call = Call(shape, share, device, dtype)
                print(f"{model}, {references} references, {share:.0%} kept")
                for backward in (False, True)[: 1 + o.backward]:
                    rows += attention_rows(call, share, o.rounds, backward, where)
                    _show(rows, backward)
            mass = mass_rows(Call(shape, 1.0, device, dtype), o.rounds, where)
            for row in mass:
                print(f"  attention_mass, {row['method']:<24}{row['ms_median']:>10.2f} ms")
            rows += mass
    if not o.quick:
        path = Path(results.__file__).parent / "results" / f"ops_{device.type}.csv"
        append(rows, path)
    return rows


def _show(rows: list[dict[str, Any]], backward: bool) -> None:
    direction = "forward + backward" if backward else "forward"
    first = max(i for i, row in enumerate(rows) if row["method"] == "dense")
    print(f"  {direction:<24}{'ms':>10}{'TFLOP/s':>10}{'of bound':>10}{'of hand':>10}")
    for row in rows[first:]:
        print(
            f"  {row['method']:<24}{row['ms_median']:>10.2f}{row['tflops']:>10.3f}{row['of_bound']:>10.2f}"
            f"{row['of_hand']:>10.2f}"
        )


if __name__ == "__main__":
    main()

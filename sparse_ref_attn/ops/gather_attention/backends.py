"""Who computes a call: the backends, one predicate of each, and the order in which "auto" tries them.

On a card "auto" goes by the verdict of `verdicts`; `ORDER` is what it takes without one, on a CPU always.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch

from ...errors import BuildError, ConfigError, VersionError
from ...kernels.cpu_library import library as cpu_library
from ..shared.choice import order_on, pick, ranked
from ..shared.requirements import UNALIGNED, csrc_reasons, has_16_byte_rows, has_triton, is_aligned
from ..verdicts import Kind, fault_of
from .arguments import Arguments

__all__ = [
    "BACKWARD", "MODULES", "ON_THE_HOST", "ORDER", "PREDICATES", "Call", "call_of", "choose", "explain",
    "flash_packages", "implementation", "order_for", "reasons", "refuse_gradients",
]  # fmt: skip

# What "auto" tries where it has no verdict: on a CPU always, on a card where nothing can be measured (see `verdicts`).
# So it holds only what needs no proof, and "cpp", whose predicate proves it.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "sdpa"),
    "cuda": ("sdpa",),
}
MODULES = {
    "sdpa": ".impl.sdpa",
    "triton": ".impl.triton_backend",
    "flash": ".impl.flash",
    "flex": ".impl.flex",
    "cuda": ".impl.cuda",
    "cpp": ".impl.cpp",
}
ON_THE_HOST = ("sdpa", "cpp")  # those that need the ranges there
BACKWARD = {"cuda": "triton"}  # whose backward belongs to a forward that has none

# What "cpp" must get right where it runs: more queries than a vector, and fewer. In bfloat16, whose rule does not hang
# on PyTorch's luck with a few roundings of float32; the sums are float32 for both.
_PROOF = Kind(
    "gather_attention", "tiles", torch.device("cpu"), torch.bfloat16, 4, 2, 40, several=True, size=(256, 64, 64, 16)
)
_UNTILED = "cannot give each query tile a selection of its own"


class Call(NamedTuple):
    """What the choice depends on.

    ``items`` is the batch size, ``per_head`` whether key/value heads have selections of their own, ``aligned`` whether
    every row of every operand starts at a multiple of 16 bytes, ``gradients`` whether an operand requires any.
    ``queries``, dense ``keys`` and ``kept`` rows are those of all items together; verdicts go by them.
    ``known_aligned``: whether Triton will know the alignment too (`is_aligned`). ``tiles``: query tiles with selections
    of their own, 0 for none.
    """

    device: torch.device
    dtype: torch.dtype
    channels: int
    items: int = 1
    per_head: bool = False
    aligned: bool = True
    gradients: bool = False
    heads: int = 1
    key_heads: int = 1
    queries: int = 0
    keys: int = 0
    kept: int = 0
    known_aligned: bool = True
    tiles: int = 0


def call_of(a: Arguments) -> Call:
    """The call with these operands."""
    given = [x for x in a.tensors if x is not None]
    kept = 0 if a.ref_indices is None or a.ref_offsets is None else a.ref_indices.shape[0] // a.ref_offsets.shape[0]
    gradients = a.cu_tiles is None and any(x.requires_grad for x in given)
    return Call(
        a.q.device, a.q.dtype, a.q.shape[2], a.items, a.per_head, all(map(has_16_byte_rows, given)),
        gradients, a.q.shape[1], a.key_heads, a.q.shape[0],
        sum(k.shape[0] for k, _, _ in a.segments), kept, all(map(is_aligned, given)), a.tiles,
    )  # fmt: skip


def _sdpa(call: Call) -> list[str]:
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return [] if call.dtype in floats else [f"needs float16, bfloat16, float32 or float64, got {call.dtype}"]


def _triton(call: Call) -> list[str]:
    if not has_triton():
        return ["needs the package triton, which is not installed"]
    import triton

    against = []
    interpreted = triton.knobs.runtime.interpret
    if call.device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(call.device) < (8, 0):
            against.append("needs a card of compute capability 8.0 or later")
    elif not interpreted:
        against.append(f"needs a CUDA device, got {call.device}")
    if call.dtype not in (torch.float16, torch.bfloat16) and not (interpreted and call.dtype == torch.float32):
        against.append(f"needs float16 or bfloat16, got {call.dtype}")
    if call.channels not in (32, 64, 128):
        against.append(f"needs a head dim of 32, 64 or 128, got {call.channels}")
    if not (call.aligned and call.known_aligned):
        against.append(UNALIGNED)
    return against


def _flash(call: Call) -> list[str]:
    against = []
    if call.device.type != "cuda":
        against.append(f"needs a CUDA device, got {call.device}")
    else:
        packages = flash_packages(call.device, call.dtype, call.gradients)
        if all(packages.values()):
            told = "; ".join(f"{name} {', '.join(why)}" for name, why in packages.items())
            against.append(f"needs a package with FlashAttention ({told})")
    if call.dtype not in (torch.float16, torch.bfloat16):
        against.append(f"needs float16 or bfloat16, got {call.dtype}")
    most = 248 if call.gradients else 256  # eight columns carry the gradient of the lse
    if call.channels % 8 or call.channels > most:
        against.append(f"needs a head dim that is a multiple of 8 and at most {most}, got {call.channels}")
    if call.per_head:
        against.append("cannot give each key/value head a selection of its own")
    if call.tiles:
        against.append(_UNTILED)
    if not call.aligned:
        against.append("needs every row to start at a multiple of 16 bytes (strides and storage offset)")
    return against


def _flex(call: Call) -> list[str]:
    against = []
    floats = (torch.float16, torch.bfloat16, torch.float32)
    if call.device.type == "cuda":
        if not has_triton():
            against.append("needs the package triton, which is not installed")
        if call.dtype not in floats:
            against.append(f"needs float16, bfloat16 or float32, got {call.dtype}")
    elif call.device.type != "cpu":
        against.append(f"needs a CUDA device or a CPU, got {call.device}")
    if call.gradients and call.device.type == "cpu":
        against.append("cannot compute gradients on a CPU")
    if call.channels < 16:
        against.append(f"needs a head dim of at least 16, got {call.channels}")
    if call.per_head:
        against.append("cannot give each key/value head a selection of its own")
    if call.tiles:
        against.append(_UNTILED)
    return against


def _cuda(call: Call) -> list[str]:
    why = csrc_reasons(call.device, call.dtype, call.channels, call.aligned)
    if call.tiles:
        why.append(_UNTILED)
    if call.gradients:
        why += [f"leaves the backward to triton, which {reason}" for reason in _triton(call)]
    return why


def _cpp(call: Call) -> list[str]:
    why = []
    try:
        cpu_library()
    except (BuildError, VersionError) as error:
        why.append(str(error))
    if call.device.type != "cpu":
        why.append(f"needs a CPU, got {call.device}")
    if call.dtype not in (torch.bfloat16, torch.float32):
        why.append(f"needs bfloat16 or float32, got {call.dtype}")
    if call.channels % 8:
        why.append(f"needs a head dim that is a multiple of 8, got {call.channels}")
    if not call.tiles:
        why.append("serves selections of query tiles alone")
    if call.gradients:
        why.append("cannot compute gradients")
    return why or [f"differs from float64 here: {wrong}" for wrong in [fault_of(_PROOF, "cpp")] if wrong]


PREDICATES: dict[str, Callable[[Call], list[str]]] = {
    "sdpa": _sdpa,
    "triton": _triton,
    "flash": _flash,
    "flex": _flex,
    "cuda": _cuda,
    "cpp": _cpp,
}
"""Why a backend cannot do a call; empty when it can."""


def reasons(backend: str, call: Call) -> list[str]:
    """Why `backend` cannot do `call`; empty when it can, as "reference" always can."""
    return [] if backend == "reference" else PREDICATES[backend](call)


def refuse_gradients(tiles: object) -> None:
    """Raise a ConfigError if a call that is to be differentiated has `tiles`: no registered backend can."""
    if tiles is not None:
        raise ConfigError(
            'gradients through cu_tiles are computed by backend="reference" alone, got an operand that requires them '
            "(use that backend, or torch.no_grad())"
        )


def explain(call: Call) -> dict[str, list[str]]:
    """Every backend with the reasons against it, the one that "auto" takes first; for `doctor` to print.

    Examples
    --------
    >>> found = explain(Call(torch.device("cpu"), torch.float32, channels=128))
    >>> list(found)[0], found["sdpa"], found["flash"][0]
    ('sdpa', [], 'needs a CUDA device, got cpu')
    """
    return ranked(order_for(call), {name: partial(reasons, name, call) for name in (*PREDICATES, "reference")})


def order_for(call: Call, measure: bool = False) -> tuple[str, ...]:
    """What "auto" tries, in order; with `measure` a verdict that is not known is got."""

    def kind() -> Kind:
        from .trial import kind_of

        return kind_of(call)

    return order_on(call.device, ORDER, kind, measure)


def choose(backend: str, call: Call) -> str:
    """The backend to use: `backend` itself, or for "auto" the first that can, in the order of the verdict.

    Raises
    ------
    ConfigError
        If it cannot do the call (each backend tried, with its reasons).
    """
    order = order_for(call, measure=True) if backend == "auto" else ()
    return pick(backend, order, {name: partial(reasons, name, call) for name in PREDICATES})


@cache
def implementation(backend: str) -> Any:
    """The module of a backend: `forward(a)` and `backward(a, ...)`; imported when it is first called."""
    return import_module(MODULES[backend], __package__)


def flash_packages(device: torch.device, dtype: torch.dtype, backward: bool = False) -> dict[str, list[str]]:
    """What is against each package with packed FlashAttention, by the name of its module, the best one first."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    capability = torch.cuda.get_device_capability(device) if nvidia else (0, 0)
    ampere = [] if capability >= (8, 0) else ["needs an NVIDIA card of compute capability 8.0 or later"]
    hopper = [] if capability[0] == 9 else ["needs an NVIDIA card of compute capability 9.0"]
    forward_only = ["has no backward"] if backward else []
    if dtype != torch.bfloat16:
        forward_only.append(f"needs bfloat16, got {dtype}")
    inside = [] if torch.backends.cuda.is_flash_attention_available() else ["was built without FlashAttention"]
    return {
        "flash_attn_interface": hopper + _flash_module("flash_attn_interface"),
        "fa3_fwd_interface": hopper + forward_only + _flash_module("fa3_fwd_interface"),
        "flash_attn": ampere + _flash_module("flash_attn", at_least=(2, 7)),
        "torch": ampere + inside,
    }


@cache
def _flash_module(name: str, at_least: tuple[int, int] = (0, 0)) -> list[str]:
    if find_spec(name) is None:
        return ["is not installed"]
    try:
        module = import_module(name)
    except (ImportError, OSError) as error:  # built for another PyTorch or CUDA
        return [f"cannot be imported: {str(error).splitlines()[0]}"]
    attend = getattr(module, "flash_attn_varlen_func", None)
    if attend is None or "return_attn_probs" not in signature(attend).parameters:
        return ["must have a flash_attn_varlen_func that returns the lse (return_attn_probs)"]
    version = str(getattr(module, "__version__", ""))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < at_least and at_least > (0, 0):
        return [f"must be {at_least[0]}.{at_least[1]} or later, got {version or 'no version'}"]
    return []

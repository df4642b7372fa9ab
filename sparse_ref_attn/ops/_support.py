"""Who can compute a call of an op, and why another cannot.

One predicate per backend returns the reasons against it; an empty list means that it can. The same
predicate picks a backend and explains a refusal. `pick`, `triton_reasons` and `cuda_reasons` serve every op, the rest
`gather_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BuildError, ConfigError, VersionError
from ..kernels.cpu_library import library as cpu_library
from ._cuda import CHANNELS, DTYPES, against
from ._flash import flash_packages
from .verdicts import JUDGED, order_of

__all__ = [
    "ORDER",
    "Call",
    "choose",
    "cuda_reasons",
    "explain",
    "has_16_byte_rows",
    "is_aligned",
    "order_for",
    "pick",
    "ranked",
    "reasons",
    "triton_reasons",
]

# What "auto" tries where it has no verdict: on a CPU always, on a card where nothing can be measured (see `verdicts`).
# So it holds only what needs no proof.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "sdpa"),
    "cuda": ("sdpa",),
}


_UNTILED = "cannot give each query tile a selection of its own"
_UNALIGNED = "needs a pointer at a multiple of 16 bytes and strides of multiples of 16 elements"


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


def _sdpa(call: Call) -> list[str]:
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return [] if call.dtype in floats else [f"needs float16, bfloat16, float32 or float64, got {call.dtype}"]


def _triton(call: Call) -> list[str]:
    if not _has_triton():
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
        against.append(_UNALIGNED)
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
        if not _has_triton():
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


def cuda_reasons(call: Call) -> list[str]:
    """Why the attention kernels of csrc cannot do `call`; empty when they can."""
    why = against(call.device)
    if call.dtype not in DTYPES:
        why.append(f"needs float16 or bfloat16, got {call.dtype}")
    if call.channels not in CHANNELS:
        why.append(f"needs a head dim of 64 or 128, got {call.channels}")
    if not call.aligned:
        why.append("needs every row to start at a multiple of 16 bytes (strides and storage offset)")
    if call.tiles:
        why.append(_UNTILED)
    if call.gradients:
        why += [f"leaves the backward to triton, which {reason}" for reason in _triton(call)]
    return why


def cpp_reasons(call: Call) -> list[str]:
    """Why the kernel of csrc/cpu cannot do `call`; empty when it can."""
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
    return why


_PREDICATES: dict[str, Callable[[Call], list[str]]] = {
    "sdpa": _sdpa,
    "triton": _triton,
    "flash": _flash,
    "flex": _flex,
    "cuda": cuda_reasons,
    "cpp": cpp_reasons,
}


def reasons(backend: str, call: Call) -> list[str]:
    """Why `backend` cannot do `call`; empty when it can, as "reference" always can."""
    return [] if backend == "reference" else _PREDICATES[backend](call)


def ranked(order: Sequence[str], predicates: Mapping[str, Callable[[], list[str]]]) -> dict[str, list[str]]:
    """Every backend of an op with the reasons against it: those that can come first, in the order of "auto"."""
    found = {name: predicates[name]() for name in (*order, *predicates)}
    return dict(sorted(found.items(), key=lambda each: bool(each[1])))


def explain(call: Call) -> dict[str, list[str]]:
    """Every backend with the reasons against it, the one that "auto" takes first; for `doctor` to print.

    Examples
    --------
    >>> found = explain(Call(torch.device("cpu"), torch.float32, channels=128))
    >>> list(found)[0], found["sdpa"], found["flash"][0]
    ('sdpa', [], 'needs a CUDA device, got cpu')
    """
    return ranked(order_for(call), {name: partial(reasons, name, call) for name in (*_PREDICATES, "reference")})


def order_for(call: Call, measure: bool = False) -> tuple[str, ...]:
    """What "auto" tries, in order: the verdict's, or the row of `ORDER`; devices other than CUDA take the CPU's.

    With `measure` a verdict that is not known is got.
    """
    safe = ORDER.get(call.device.type, ORDER["cpu"])
    if call.device.type not in JUDGED:
        return safe
    from .gather_attention.trial import kind_of

    return order_of(kind_of(call), safe, measure)


def choose(backend: str, call: Call) -> str:
    """The backend to use: `backend` itself, or for "auto" the first that can, in the order of the verdict.

    Raises
    ------
    ConfigError
        If it cannot do the call (each backend tried, with its reasons).
    """
    order = order_for(call, measure=True) if backend == "auto" else ()
    return pick(backend, order, {name: partial(reasons, name, call) for name in _PREDICATES})


def pick(backend: str, order: Sequence[str], predicates: Mapping[str, Callable[[], list[str]]]) -> str:
    """`backend` itself if it can do the call, or for "auto" the first of `order` that can.

    Raises
    ------
    ConfigError
        If none can (each one tried, with its reasons), or the name is unknown.
    """
    if backend != "auto" and backend not in predicates:
        raise ConfigError(f"backend must be one of {('auto', *predicates)}, got {backend!r}")
    tried: dict[str, list[str]] = {}
    for name in order if backend == "auto" else (backend,):
        tried[name] = predicates[name]()
        if not tried[name]:
            return name
    told = "; ".join(f"{name}: {', '.join(why)}" for name, why in tried.items())
    told = told or "none that agrees with the definition on this device (`sra doctor --verify` prints the figures)"
    raise ConfigError(f"the backend must be able to do the call, got {told}")


def has_16_byte_rows(x: Tensor) -> bool:
    """Whether every row along the last dim starts at a multiple of 16 bytes."""
    return not x.numel() or (
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    )


def is_aligned(x: Tensor) -> bool:
    """Whether Triton will know that every row along the last dim starts at a multiple of 16 bytes.

    It asks that of the pointer, and 16 elements of every stride; otherwise it turns its 16-byte asynchronous copies
    into 2-byte loads, without a word.
    """
    if not x.numel():
        return True
    strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return x.data_ptr() % 16 == 0 and all(n == 1 or s % 16 == 0 for n, s in strides)


def triton_reasons(*tensors: Tensor) -> list[str]:
    """Why Triton kernels cannot run on these tensors (last dim: channels); the op's own limits come on top."""
    if not _has_triton():
        return ["needs triton"]
    from triton import knobs

    why = []
    interpreted = knobs.runtime.interpret
    if not interpreted and not all(x.is_cuda for x in tensors):
        why.append(f"needs a CUDA device, or TRITON_INTERPRET=1, got {tensors[0].device}")
    if any(x.stride(-1) != 1 for x in tensors if x.numel()):
        why.append("needs a contiguous last dim")
    elif not all(is_aligned(x) for x in tensors if x.numel()):
        why.append(_UNALIGNED)
    return why


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None

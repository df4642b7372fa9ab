"""What is installed, what it makes possible here, and why the rest is not."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .errors import VersionError
from .extras import PACKAGES, absent, versions
from .hooks.diffusers import TESTED, check_diffusers
from .models import supported
from .ops.attention_mass.backends import explain as explain_mass
from .ops.gather_attention.backends import Call, flash_packages
from .ops.gather_attention.backends import explain as explain_attention
from .ops.pack_rows.backends import explain as explain_rows
from .ops.verdicts import JUDGED
from .ops.verdicts.table import verify as verify_kinds
from .selection.names import NAMES

__all__ = [
    "Ability", "backends", "device", "diagnose", "report", "verdict_lines", "verify", "versions",
]  # fmt: skip

CHANNELS = 128  # of the call that backends are asked for


@dataclass(frozen=True)
class Ability:
    """One thing the library can do.

    Parameters
    ----------
    what : str
    missing : str
        What is in the way, in words; empty when nothing is.
    """

    what: str
    missing: str = ""


def device(name: str | None = None) -> str:
    """A torch device in words; the one that runs by default when none is named.

    Examples
    --------
    >>> device("cpu").startswith("CPU (")
    True
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        threads = torch.get_num_threads()
        kind = "CPU" if name == "cpu" else name
        return f"{kind} ({platform.machine()}, {threads} thread{'s' * (threads != 1)})"
    found = torch.cuda.get_device_properties(name)
    memory = found.total_memory / 2**30
    return f"{found.name} (CUDA {torch.version.cuda}, sm_{found.major}{found.minor}, {memory:.0f} GiB)"


def backends() -> dict[str, dict[str, list[str]]]:
    """Every backend of every op with the reasons against it here, the one that "auto" takes first.

    Asked for a plain call in bfloat16 with 128 channels, on the GPU if there is one; a call of another kind may
    be refused by more of them.

    Examples
    --------
    >>> found = backends()
    >>> sorted(found)
    ['attention_mass', 'gather_attention', 'gather_attention, query tiles', 'pack_rows']
    >>> found["pack_rows"]["reference"]
    []
    """
    call = _plain_call()
    x = torch.empty(1, 16, 1, CHANNELS, dtype=call.dtype, device=call.device)
    return {
        "gather_attention": explain_attention(call),
        "gather_attention, query tiles": explain_attention(_plain_call(tiles=1)),
        "attention_mass": explain_mass(x, x, CHANNELS**-0.5),
        "pack_rows": explain_rows([x], torch.zeros(1, dtype=torch.int64, device=call.device), 1),
    }


def _flash_packages() -> dict[str, list[str]]:
    call = _plain_call()
    return flash_packages(call.device, call.dtype)


def _plain_call(tiles: int = 0) -> Call:
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Call(where, torch.bfloat16, CHANNELS, tiles=tiles)


def _abilities(installed: dict[str, str | None]) -> list[Ability]:
    pipelines = absent(installed, "diffusers")
    if not pipelines:
        try:
            check_diffusers()
        except VersionError as error:
            pipelines = str(error)
    gpu = "" if torch.cuda.is_available() else "no CUDA device, or torch was built without CUDA"
    offload = gpu or absent(installed, "diffusers", ("accelerate",))
    return [
        Ability("patch a diffusers pipeline", pipelines),
        Ability("patch a transformer of your own (PlainAdapter)"),
        Ability("sra demo", pipelines),
        Ability("sra run", pipelines),
        Ability("sra estimate", pipelines),
        Ability("sra compare and eval", pipelines or absent(installed, "eval")),
        Ability("sra train", pipelines or absent(installed, "train")),
        Ability("sra app", pipelines or absent(installed, "app")),
        Ability("run on a GPU", gpu),
        Ability("offload a model to the CPU's memory (sra run --offload)", offload),
    ]


def diagnose() -> dict[str, Any]:
    """Everything `report` prints, as JSON types.

    Examples
    --------
    >>> sorted(diagnose())
    ['backends', 'can', 'cannot', 'device', 'flash_packages', 'models', 'selectors', 'versions']
    """
    installed = versions()
    abilities = _abilities(installed)
    return {
        "versions": installed,
        "device": device(),
        "can": [a.what for a in abilities if not a.missing],
        "cannot": {a.what: a.missing for a in abilities if a.missing},
        "models": supported(),
        "selectors": {name: (cls.__doc__ or "").splitlines()[0] for name, cls in NAMES.items()},
        "backends": {
            op: {
                "auto": next(iter(found)),
                "can": [name for name, why in found.items() if not why],
                "cannot": {name: "; ".join(why) for name, why in found.items() if why},
            }
            for op, found in backends().items()
        },
        "flash_packages": {name: "; ".join(why) for name, why in _flash_packages().items()},
    }


def report() -> str:
    """What `diagnose` found, as text."""
    found = diagnose()
    first, last = (f"{major}.{minor}" for major, minor in TESTED)
    wanted = f"tested: {first} to {last}"
    lines = ["Versions"]
    for name, version in found["versions"].items():
        use = f"{PACKAGES[name]}; {wanted}" if name == "diffusers" else PACKAGES.get(name, "")
        lines.append(f"  {name:<16} {version or 'not installed':<16} {use}".rstrip())
    lines += ["", "Device", f"  {found['device']}", "", "Possible here"]
    lines += [f"  yes  {what}" for what in found["can"]]
    lines += [f"  no   {what}: {why}" for what, why in found["cannot"].items()]
    lines += ["", "Transformers that can be patched"]
    lines += [f"  {name.rpartition('.')[2]:<32} {family}" for name, family in found["models"].items()]
    lines += ["", "Selectors, by name (sra run --select NAME)"]
    lines += [f"  {name:<16} {what}" for name, what in found["selectors"].items()]
    lines += ["", f"Backends of the ops (bfloat16, {CHANNELS} channels)"]
    for op, here in found["backends"].items():
        lines += [f"  {op}"]
        lines += [f"    {name:<14} {'yes, auto takes it' if name == here['auto'] else 'yes'}" for name in here["can"]]
        lines += [f"    {name:<14} no: {why}" for name, why in here["cannot"].items()]
    if _plain_call().device.type in JUDGED:
        lines += ["  auto goes by what was measured here: sra doctor --verify"]
    lines += ["", "Modules with FlashAttention (flash calls the first that can)"]
    lines += [f"  {name:<20} {f'no: {why}' if why else 'yes'}" for name, why in found["flash_packages"].items()]
    return "\n".join(lines)


def verify(name: str | None = None) -> Iterator[dict[str, Any]]:
    """Compare every backend of every op with float64, and time those that agree, on a device; see `ops.verdicts`.

    Parameters
    ----------
    name : str, optional
        A torch device. Default: the GPU if there is one.

    Yields
    ------
    dict
        ``kind`` in words, and as JSON types what `ops.verdicts.Verdict` holds: ``order``, ``milliseconds``, ``errors``
        (over what is allowed), ``unusable``, ``unable``.
    """
    for kind, verdict in verify_kinds(_where(name)):
        yield {"kind": kind.name, **verdict._asdict()}


def verdict_lines(name: str | None = None) -> Iterator[str]:
    """What `verify` finds, as the lines of a table, each as soon as it is known."""
    where = _where(name)
    yield f"{device(name)}"
    if where.type in JUDGED:
        yield "auto takes the first of each kind, from now on"
    else:
        yield f"auto does not go by these times on {where.type}: it is fixed there, so that results repeat"
    yield f"  {'backend':<12}{'ms':>10}  error, of what is allowed"
    for row in verify(name):
        yield row["kind"]
        for backend in row["order"]:
            took = row["milliseconds"][backend]
            yield f"  {backend:<12}{f'{took:.3f}' if took else 'alone':>10}  {row['errors'][backend]:.2f}"
        for backend, why in row["unusable"].items():
            yield f"  {backend:<12}  UNUSABLE  {why}"
        for backend, why in row["unable"].items():
            yield f"  {backend:<12}{'-':>10}  {why}"


def _where(name: str | None) -> torch.device:
    if name is not None:
        return torch.device(name)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

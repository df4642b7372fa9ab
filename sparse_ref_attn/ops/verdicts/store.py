"""Verdicts of this process and, in the user's cache folder, of this device with these versions.

One file a device and its versions, JSON, replaced as a whole. Whatever cannot be read is measured again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...errors import ConfigError
from ...files import replacing
from .judge import Verdict
from .kind import Kind

__all__ = ["environment", "folder", "forget", "lookup", "remember"]

logger = logging.getLogger("sparse_ref_attn")

PACKAGES = ("triton", "flash-attn", "flash-attn-3", "fa3-fwd")
_KNOWN: dict[Kind, Verdict] = {}
_READ: set[torch.device] = set()


def folder() -> Path:
    """Where the files lie; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sparse_ref_attn" / "verdicts"


def lookup(kind: Kind) -> Verdict | None:
    """What is known of a kind, from this process or an earlier one."""
    if kind.device not in _READ:
        _READ.add(kind.device)
        for other, verdict in _load(kind.device).items():
            _KNOWN.setdefault(other, verdict)
    return _KNOWN.get(kind)


def known() -> dict[Kind, Verdict]:
    """All that this process knows."""
    return dict(_KNOWN)


def remember(kind: Kind, verdict: Verdict) -> None:
    """Keep a verdict for this process and the next ones; a folder that cannot be written is said once."""
    _KNOWN[kind] = verdict
    path = _path(kind.device)
    both = {**_load(kind.device), kind: verdict}
    data = {
        "environment": environment(kind.device),
        "verdicts": [{"kind": _packed(each), "verdict": found._asdict()} for each, found in both.items()],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            Path(draft).write_text(json.dumps(data, indent=1), encoding="utf-8")
    except (ConfigError, OSError) as error:
        _say_once(f"verdicts of backends are kept for this process alone: {error}")


def forget() -> None:
    """Know nothing; files stay, and are read again."""
    _KNOWN.clear()
    _READ.clear()


@cache
def environment(device: torch.device) -> dict[str, str]:
    """The device, its driver and the versions whose verdicts hold for one another."""
    found = {"device": f"{device.type}: {platform.machine()}, {torch.get_num_threads()} threads", "driver": ""}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.major}.{properties.minor}"
        found["driver"] = _driver()
    found |= {"torch": torch.__version__, "sparse-ref-attn": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _driver() -> str:
    """The first line that NVIDIA's driver says of itself, else the CUDA version that it offers."""
    told = Path("/proc/driver/nvidia/version")
    if told.is_file():
        return told.read_text(encoding="utf-8", errors="replace").splitlines()[0]
    return str(torch._C._cuda_getDriverVersion()) if hasattr(torch._C, "_cuda_getDriverVersion") else ""


def _path(device: torch.device) -> Path:
    text = json.dumps(environment(device), sort_keys=True)
    return folder() / f"{device.type}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _load(device: torch.device) -> dict[Kind, Verdict]:
    """What the file holds; nothing where it is missing, broken or of another environment."""
    try:
        data = json.loads(_path(device).read_text(encoding="utf-8"))
        if data["environment"] != environment(device):
            return {}
        return {_unpacked(each["kind"], device): _verdict(each["verdict"]) for each in data["verdicts"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _packed(kind: Kind) -> dict[str, Any]:
    return {**kind._asdict(), "device": kind.device.type, "dtype": str(kind.dtype).removeprefix("torch.")}


def _unpacked(data: dict[str, Any], device: torch.device) -> Kind:
    return Kind(**{**data, "device": device, "dtype": getattr(torch, data["dtype"]), "size": tuple(data["size"])})


def _verdict(data: dict[str, Any]) -> Verdict:
    return Verdict(**{**data, "order": tuple(data["order"])})


@cache
def _say_once(what: str) -> None:
    logger.warning("%s", what)

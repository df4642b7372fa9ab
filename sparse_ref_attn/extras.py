"""The packages of each extra: which are installed, and how to get one that is not."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

from . import __version__

__all__ = ["DISTRIBUTIONS", "EXTRAS", "MODULES", "PACKAGES", "absent", "absent_module", "missing", "versions"]

PACKAGES = {
    "torch": "core",
    "numpy": "core",
    "einops": "core",
    "triton": "core on Linux",
    "diffusers": "pipelines",
    "transformers": "pipelines",
    "accelerate": "offloading",
    "pillow": "pictures",
    "peft": "training",
    "matplotlib": "evaluation",
    "scikit-image": "evaluation",
    "scipy": "evaluation",
    "gradio": "page in the browser",
    "flash-attn": "optional attention kernels",
    "flash-attn-3": "optional attention kernels",
    "fa3-fwd": "optional attention kernels",
    "torchao": "optional quantised transformers",
    "bitsandbytes": "optional quantised transformers",
}
"""What is asked for, and what each is for."""
EXTRAS = {
    "diffusers": ("diffusers", "transformers", "pillow"),
    "eval": ("matplotlib", "scikit-image", "scipy"),
    "train": ("accelerate", "peft"),
    "app": ("gradio",),
}
"""What the commands cannot do without."""
MODULES = {
    "diffusers": ("diffusers", "transformers", "accelerate", "PIL", "safetensors", "sentencepiece", "google.protobuf"),
    "eval": ("matplotlib", "skimage", "scipy"),
    "train": ("peft",),
    "app": ("gradio",),
}
"""What each extra brings, by the names that are imported."""
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "google.protobuf": "protobuf"}
"""Of modules with another name than the package that they come in."""


def versions() -> dict[str, str | None]:
    """Versions of Python, this library and the packages it knows; None for one that is not installed.

    Examples
    --------
    >>> versions()["sparse-ref-attn"] == __version__
    True
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "sparse-ref-attn": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def missing(*extras: str) -> str:
    """What the first of these extras that is not whole lacks, and how to get it, in words; empty if all are whole.

    Parameters
    ----------
    *extras : "diffusers", "eval", "train" or "app"

    Examples
    --------
    >>> missing("diffusers")
    ''
    """
    installed = versions()
    return next(filter(None, (absent(installed, extra) for extra in extras)), "")


def absent_module(name: str) -> str:
    """How to get a module that cannot be imported, as the words of `missing`; empty for one that no extra brings.

    Parameters
    ----------
    name : str
        Of the module or one inside it.

    Examples
    --------
    >>> absent_module("PIL.Image")
    "pillow not installed: pip install 'sparse-ref-attn[diffusers]'"
    """
    for extra, modules in MODULES.items():
        for module in modules:
            if f"{name}.".startswith(f"{module}."):
                return _install([DISTRIBUTIONS.get(module, module)], extra)
    return ""


def absent(installed: dict[str, str | None], extra: str, names: Sequence[str] = ()) -> str:
    """The words of `missing` on one extra, or on `names` of its packages, given what `versions` found."""
    lacking = [name for name in names or EXTRAS[extra] if installed[name] is None]
    return _install(lacking, extra) if lacking else ""


def _install(names: Sequence[str], extra: str) -> str:
    return f"{', '.join(names)} not installed: pip install 'sparse-ref-attn[{extra}]'"

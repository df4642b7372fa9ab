"""Drops the reference tokens that a reference-conditioned diffusion transformer does not use.

Public names are imported on first use, so importing the package loads nothing else: neither
diffusers nor kernels, and CUDA stays untouched.

Examples
--------
>>> import sparse_ref_attn as sra
>>> sra.RefSelection.__module__
'sparse_ref_attn.types'
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# The home of each public name.
_HOMES = {
    "adapters": ("PlainAdapter", "register_adapter"),
    "batching": ("BatchResult", "batch"),
    "estimation": ("estimate",),
    "patching": ("PatchHandle", "patch", "patched"),
    "config": ("SparseRef",),
    "errors": (
        "BatchError",
        "BudgetError",
        "BuildError",
        "ConfigError",
        "HandleRemovedError",
        "IncompatibleError",
        "KernelError",
        "LayoutError",
        "NonFiniteError",
        "PixelsUnavailableError",
        "SparseRefError",
        "UnsupportedModelError",
        "VersionError",
    ),
    "presets": ("ReCAST", "SparseContext"),
    "reference_cache": ("ReferenceCache",),
    "rivals": ("Downscale", "ToMe"),
    "schedules": ("Constant", "Descending", "Linear", "Pieces", "Polynomial", "TopP"),
    "selection": (
        "AttentionMass",
        "Boxes",
        "Cosine",
        "Edges",
        "FromFunction",
        "Grid",
        "Mix",
        "Random",
        "Ranking",
        "Saliency",
        "SavedRanking",
        "SelfAttention",
        "SubjectMask",
        "Union",
    ),
    "training": ("RandomDrop", "TrainingHandle", "drop_reference", "patch_for_training"),
    "types": ("RefSelection", "Reference", "TokenLayout"),
}
_MODULES = ("errors", "functional", "schedules", "selection")  # schedules.Cosine is a budget, Cosine a selector
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AttentionMass",
    "BatchError",
    "BatchResult",
    "Boxes",
    "BudgetError",
    "BuildError",
    "ConfigError",
    "Constant",
    "Cosine",
    "Descending",
    "Downscale",
    "Edges",
    "FromFunction",
    "Grid",
    "HandleRemovedError",
    "IncompatibleError",
    "KernelError",
    "LayoutError",
    "Linear",
    "Mix",
    "NonFiniteError",
    "PatchHandle",
    "Pieces",
    "PixelsUnavailableError",
    "PlainAdapter",
    "Polynomial",
    "Random",
    "RandomDrop",
    "Ranking",
    "ReCAST",
    "RefSelection",
    "Reference",
    "ReferenceCache",
    "Saliency",
    "SavedRanking",
    "SelfAttention",
    "SparseContext",
    "SparseRef",
    "SparseRefError",
    "SubjectMask",
    "ToMe",
    "TokenLayout",
    "TopP",
    "TrainingHandle",
    "Union",
    "UnsupportedModelError",
    "VersionError",
    "__version__",
    "batch",
    "drop_reference",
    "errors",
    "estimate",
    "functional",
    "patch",
    "patch_for_training",
    "patched",
    "register_adapter",
    "schedules",
    "selection",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

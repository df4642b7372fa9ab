"""The names that settings have everywhere, on the command line and in Python; nothing heavy is imported for them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from .errors import ConfigError

__all__ = ["chosen"]

CHOSEN_PRESETS = ("faithful", "balanced", "fast")
PAPERS = ("recast", "sparse-context")
PRESETS = (*CHOSEN_PRESETS, *PAPERS)
"""Those that were chosen on the frontier, which keep every token, and those that drop tokens."""
DEFAULT_PRESET = "balanced"
TASKS = ("auto", "edit", "subject", "style")
SELECTORS = ("random", "grid", "edges", "saliency", "cosine", "self-attention", "mass", "learned")
TRAINED = ".safetensors"
"""End of a file that a trained selector is in, which may stand where a selector's name does."""
FAMILIES: dict[str, tuple[str, ...]] = {
    "flux": ("kontext",),
    "flux2": ("flux2-dev", "klein-9b", "klein-9b-kv", "klein-4b"),
    "qwen": ("qwen-image-edit", "qwen-image-edit-2511", "qwen-image-layered"),
    "longcat": ("longcat-image-edit",),
    "flux3": ("flux3",),
    "fibo": ("fibo-edit",),
    "joyimage": ("joyimage-edit",),
    "joyimage_plus": ("joyimage-edit-plus",),
    "glm_image": ("glm-image",),
    "qwen21": ("qwen-image-2.1",),
    "zimage": ("z-image-omni",),
    "ltx2": ("ltx-2",),
}
"""The model families, one line each: the module in `models`, and the published models that it describes."""
MODELS = tuple(name for names in FAMILIES.values() for name in names)
DTYPES = ("bfloat16", "float16", "float32")
OFFLOADS = ("none", "model", "sequential")
QUANTIZATIONS = ("int8", "float8", "nf4")
SCHEDULES: tuple[str, ...] = ("flat", "rising", "falling", "dense-first")
"""Ways to spread the same tokens over the steps; "dense-first" spends one dense step more, as ReCAST does."""
RULES: tuple[str, ...] = (
    "downscaled", "ReCAST", "edges", "saliency", "mass x values", "self-attention", "cosine", "grid", "random", "ToMe",
    "cache", "tiles", "subject mask", "learned",
)  # fmt: skip
"""Ways to spend tokens on a reference, the user's real alternative first; "cache" computes them in that share of the
steps and reads all that it stored, "tiles" an eighth of it, each tile its own, and the means of the rest."""
METHODS: tuple[str, ...] = (
    "downscaled", "ReCAST rising", "ReCAST flat", "edges", "saliency", "mass x values", "self-attention", "cosine",
    "grid", "random", "ToMe", "cache", "tiles",
)  # fmt: skip
"""The rules that need no mask and no training, by `eval.methods.method_name`."""
FEWER = "fewer steps"
"""The dense run in fewer steps: what a user would do without this library."""
STEP_CACHES: tuple[str, ...] = ("TaylorSeer", "TaylorSeer lite", "FirstBlockCache", "cache-dit")
RIVALS: tuple[str, ...] = (FEWER, *STEP_CACHES)
"""Ways to save work that leave the references alone."""
COMBINED: tuple[str, ...] = tuple(
    f"{rule} + {rival}" for rule in ("cache", "tiles", "ReCAST", "saliency") for rival in (FEWER, "TaylorSeer")
)
"""A rule and a rival in one run."""
SAME = {"mass": "ReCAST", "mass rising": "ReCAST rising", "mass flat": "ReCAST flat"}
"""The selector's name of a rule, by which `RULES` and `METHODS` may be called too."""
OPEN_SCENERY = "open scenery"
"""The kind of edit whose answer is a distribution: subjects go where the prompt says, what is behind them is open."""
BUILTIN = ("small", "large", "tiny")
EDITS = ("place", "pair", "swap", "local", "global")
LAYOUTS = ("folder", "kontext-bench", "dreambench++", "pie-bench")
METRICS = ("psnr", "ssim", "subject-psnr", "identity", "lpips", "dists", "face", "scenery-psnr", "scenery-contrast")
DISTRIBUTIONS = ("uniform", "log_uniform", "arcsine")


def chosen(what: str, given: object, choices: Iterable[str], same: Mapping[str, str] | None = None) -> str:
    """The one of `choices` that is meant: case does not matter, nor whether words are joined by "-", "_" or " ".

    Parameters
    ----------
    what : str
        The setting, for the error.
    given : object
    choices : iterable of str
    same : mapping of str to str, optional
        Further names of some choices.

    Raises
    ------
    ConfigError
        If it is none of them; it names the choice that may have been meant.

    Examples
    --------
    >>> chosen("task", "Edit", TASKS), chosen("a preset", "Sparse_Context", PRESETS)
    ('edit', 'sparse-context')
    >>> chosen("rows", "bugdet", ("budget", "all"))
    Traceback (most recent call last):
    sparse_ref_attn.errors.ConfigError: rows must be one of budget, all, got 'bugdet'; did you mean 'budget'?
    """
    choices = tuple(choices)
    meant = {choice: choice for choice in choices}
    meant |= {name: choice for name, choice in (same or {}).items() if choice in choices}
    for name, choice in meant.items():
        if isinstance(given, str) and _plain(given) == _plain(name):
            return choice
    raise ConfigError(f"{what} must be one of {', '.join(choices)}, got {given!r}{near(given, meant)}")


def near(given: object, choices: Iterable[str]) -> str:
    """``"; did you mean 'X'?"`` where one of the choices is like `given`, else nothing."""
    known = {_plain(choice): choice for choice in choices}
    found = difflib.get_close_matches(_plain(given), known, n=1) if isinstance(given, str) else []
    return f"; did you mean {known[found[0]]!r}?" if found else ""


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")

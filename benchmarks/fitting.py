"""Which card a model needs, by `estimate`: a table for the page about memory."""

from __future__ import annotations

import sparse_ref_attn as sra
from sparse_ref_attn.models import named_model

from .plots import NAMES

__all__ = ["CARDS", "fitting"]

CARDS = (24, 32, 48, 80, 96, 141)
"""GB of cards' memory."""

CALLS = (
    ("kontext", 1), ("flux2-dev", 1), ("flux2-dev", 4), ("klein-4b", 1), ("klein-4b", 4), ("klein-9b", 1),
    ("klein-9b", 4), ("qwen-image-edit", 1), ("qwen-image-edit-2511", 2),
)  # fmt: skip
"""Models, and how many references; all of 1024 x 1024 pixels, as is the output."""


def fitting() -> str:
    """Markdown: GB of a call's parts in bfloat16, and the smallest card that holds it with all tokens, also stored."""
    header = ["model", "references", "weights", "activations, all tokens", "activations, 25 % kept"]
    header += ["stored K and V, all tokens", "card, dropping", "card, storing all"]
    lines = [f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1)]
    models = {name: named_model(name) for name in dict(CALLS)}
    for name, count in CALLS:
        found = sra.estimate(models[name], 0.25, references=[(1024, 1024)] * count, steps=28).memory
        dense, sparse = found.dense, found.sparse_step
        sizes = [dense.parameters, dense.activations, sparse.activations, found.dense_reference_kv]
        cells = [NAMES[name], str(count), *(f"{size / 1e9:.1f}" for size in sizes)]
        lines.append(f"| {' | '.join([*cells, _card(dense.total), _card(dense.total + sizes[-1])])} |")
    return "\n".join(lines)


def _card(size: int) -> str:
    return next((f"{card} GB" for card in CARDS if size <= card * 1e9), f"more than {CARDS[-1]} GB")

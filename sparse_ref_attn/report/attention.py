"""How concentrated a run's attention to the references was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ConfigError
from ..record import RunRecord
from .words import aligned, digits

__all__ = ["attention_table"]

_KEYS = ("step", "block", "reference", "head")
_MEASURES = ("top_quarter", "entropy", "mass")


def attention_table(record: RunRecord) -> dict[str, Any]:
    """How concentrated the generation's attention to the references was (ReCAST's diagnostics).

    Parameters
    ----------
    record : RunRecord
        A run with at least one profiled step.

    Returns
    -------
    dict
        "by_step", "by_reference", "by_block", "by_head" (block and head) and "each" (step, block,
        reference and head): dicts of lists of equal length, with the keys they are by and
        "top_quarter" (share of a reference's mass in its top 25 % tokens, in [0.25, 1]),
        "entropy" (bits, in [0, log2 of the reference's tokens]) and "mass" (attention paid to one
        reference, in [0, 1]), each a mean; None where it was not finite. "by_reference" also has
        "entropy_uniform", the entropy of an even spread. References count from 1, the rest from 0.
        "text": the means by step and by block as a short table.

    Raises
    ------
    ConfigError
        If no attention was measured.

    Examples
    --------
    >>> import torch
    >>> from sparse_ref_attn.record import BlockAttention, RunRecord
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> run = RunRecord(TokenLayout(8, 0, (0, 4), (Reference(4, 4),)), 1, 2)
    >>> one = torch.tensor([[0.25, 0.75]])  # one reference, two heads
    >>> run.attention = [BlockAttention(0, 0, mass=one, entropy=one, top_quarter=one)]
    >>> attention_table(run)["by_step"]
    {'step': [0], 'top_quarter': [0.5], 'entropy': [0.5], 'mass': [0.5]}
    """
    if not record.attention:
        raise ConfigError(
            "attention diagnostics need a run with a profiling step (a selector that measures attention), "
            f"got {len(record.steps)} steps without one"
        )
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*_KEYS, *_MEASURES)}
    for entry in record.attention:
        references, heads = np.indices(tuple(entry.mass.shape))
        keys = (np.full_like(heads, entry.step), np.full_like(heads, entry.block), references + 1, heads)
        for name, key in zip(_KEYS, keys, strict=True):
            parts[name].append(key.ravel())
        for name in _MEASURES:
            parts[name].append(_array(getattr(entry, name)).ravel())
    columns = {name: np.concatenate(part) for name, part in parts.items()}
    table: dict[str, Any] = {f"by_{name}": _means(columns, name) for name in ("step", "reference", "block")}
    table["by_head"] = _means(columns, "block", "head")
    table["each"] = _means(columns, *_KEYS)
    sizes = record.layout.sizes
    table["by_reference"]["entropy_uniform"] = [math.log2(sizes[i - 1]) for i in table["by_reference"]["reference"]]
    lines = []
    for name in ("step", "reference", "block"):
        part = table[f"by_{name}"]
        rows = [[str(key), *(digits(part[m][i]) for m in _MEASURES)] for i, key in enumerate(part[name])]
        lines += [*aligned([name, "mass in top 25 %", "entropy (bits)", "mass"], rows), ""]
    table["text"] = "\n".join(lines[:-1])
    return table


def _means(columns: dict[str, np.ndarray], *names: str) -> dict[str, list[Any]]:
    """Mean of every measure over the entries that share the named keys."""
    keys = np.stack([columns[name] for name in names], axis=1)
    groups, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    out: dict[str, list[Any]] = {name: groups[:, i].tolist() for i, name in enumerate(names)}
    for name in _MEASURES:
        fine = np.isfinite(columns[name])
        sums = np.bincount(group[fine], columns[name][fine], len(groups))
        counts = np.bincount(group[fine], minlength=len(groups))
        out[name] = [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]
    return out


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()

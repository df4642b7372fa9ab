"""From scores to kept tokens: one order of all reference tokens, of which every budget is a prefix."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BudgetError, ConfigError

__all__ = ["fingerprint", "nested_order", "order", "per_reference", "prefix"]


def order(scores: Sequence[Tensor], floors: Sequence[int], weights: Sequence[float] | None = None) -> Tensor:
    """Order of all references' tokens, the most valuable first, in which references compete.

    The first ``sum(floors)`` places go to the best ``floors[i]`` tokens of each reference i, the others follow;
    within both groups a higher weighted score comes first, and of equal ones the lower index. So any prefix
    of at least ``sum(floors)`` tokens holds at least ``floors[i]`` of each reference, its best ones.

    Parameters
    ----------
    scores : sequence of Tensor, shapes (R_i,), floating
        Finite scores of each reference, comparable across references.
    floors : sequence of int
        Least tokens of each reference, 0 <= floors[i] <= R_i.
    weights : sequence of float, optional
        Importance of each reference, finite and > 0. A weighted score is w_i * (s - m), m the lowest score of
        all references: for attention mass and other shares, whose lowest is about 0, plainly w_i * s. Equal
        weights change nothing, nor does any weight change the order within a reference (up to rounding),
        nor scaling or shifting all scores.

    Returns
    -------
    Tensor, shape (R,), int64
        A permutation, counted through all references, on the scores' device.

    Raises
    ------
    BudgetError
        If a floor is negative or more than its reference has.
    ConfigError
        If there are not as many floors or weights as references, or a weight is out of range.

    Notes
    -----
    No host sync. Deterministic: sorts are stable.

    Examples
    --------
    >>> a, b = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.1, 0.2])
    >>> order([a, b], floors=(0, 1))
    tensor([4, 0, 1, 2, 3])
    >>> order([a, b], floors=(0, 1))[:1], order([a, b], floors=(1, 1))[:2]
    (tensor([4]), tensor([0, 4]))
    >>> order([a, b], floors=(0, 0), weights=(1, 10))
    tensor([4, 0, 1, 2, 3])
    """
    if not scores:
        raise ConfigError("there must be at least one reference to order, got none")
    _check_counts("floors", floors, scores)
    joint = torch.cat(list(scores))
    if weights is not None:
        if len(weights) != len(scores):
            raise ConfigError(f"there must be as many weights as references, {len(scores)}, got {len(weights)}")
        if not all(0 < weight < math.inf for weight in weights):
            raise ConfigError(f"weights must be finite and above 0, got {tuple(weights)}")
        if joint.numel():
            lowest = joint.min()
            joint = torch.cat([weight * (s - lowest) for s, weight in zip(scores, weights, strict=True)])
    first = torch.ones_like(joint, dtype=torch.int8)  # 0 for the floors' tokens
    first.index_fill_(0, _best(scores, floors), 0)
    ranked = joint.sort(descending=True, stable=True).indices
    return ranked[first[ranked].sort(stable=True).indices]


def prefix(ranked: Tensor, count: int) -> Tensor:
    """The first `count` tokens of an order, ascending, shape (count,) int64. No host sync.

    Raises
    ------
    BudgetError
        If `count` is negative or more than there are tokens.

    Examples
    --------
    >>> prefix(torch.tensor([4, 0, 1, 2, 3]), 3)
    tensor([0, 1, 4])
    """
    if not 0 <= count <= len(ranked):
        raise BudgetError(f"a budget must lie in 0..{len(ranked)} tokens, got {count}")
    return ranked[:count].sort().values


def per_reference(scores: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The best ``counts[i]`` tokens of each reference i, ascending, counted through all references.

    Parameters
    ----------
    scores : sequence of Tensor, shapes (R_i,)
        Finite scores; of equal ones the lower index is kept.
    counts : sequence of int
        0 <= counts[i] <= R_i.

    Returns
    -------
    Tensor, shape (sum of counts,), int64
        On the scores' device. No host sync.

    Raises
    ------
    BudgetError
        If a count is negative or more than its reference has.
    ConfigError
        If there are not as many counts as references.

    Examples
    --------
    >>> per_reference([torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5, 0.7])], (1, 2))
    tensor([1, 2, 4])
    """
    if not scores:
        raise ConfigError("there must be at least one reference to choose from, got none")
    _check_counts("counts", counts, scores)
    return _best(scores, counts).sort().values


def nested_order(
    scores: Sequence[Tensor], counts: Sequence[Sequence[int]]
) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """Order of the tokens that any of several budgets keeps, of which each nested budget's choice is a prefix.

    Budgets that keep tokens of each reference are nested where one keeps at least as many of *every*
    reference as the other. Of the given ones, from the smallest to the largest, those that are nested
    in this way are prefixes; a budget that is not needs an order of its own.

    Parameters
    ----------
    scores : sequence of Tensor, shapes (R_i,)
        Finite scores; of equal ones the lower index comes first, as in `per_reference`.
    counts : sequence of (sequence of int)
        Budgets: tokens of each reference, 0 <= counts[b][i] <= R_i.

    Returns
    -------
    order : Tensor, shape (K,), int64
        Counted through all references, on the scores' device; K is the most that any budget keeps
        of each reference, summed. No host sync.
    nested : tuple of (tuple of int)
        The budgets whose choice is the first ``sum(budget)`` tokens of `order`; the last is all of it.

    Raises
    ------
    BudgetError, ConfigError
        As `per_reference`.

    Examples
    --------
    >>> a, b = torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.6, 0.7])
    >>> nested_order([a, b], [(1, 1), (1, 3), (2, 2)])
    (tensor([1, 4, 3, 2, 0]), ((1, 1), (1, 3), (2, 3)))
    """
    distinct = sorted({tuple(c) for c in counts}, key=lambda c: (sum(c), c))
    for budget in distinct:
        _check_counts("counts", budget, scores)
    starts = [0, *itertools.accumulate(len(score) for score in scores)]
    ranked = [s.sort(descending=True, stable=True).indices + at for s, at in zip(scores, starts, strict=False)]
    nested, below, pieces = [], (0,) * len(scores), []
    most = tuple(max(each) for each in zip(*distinct, strict=True))
    for budget in [*distinct, most]:
        if all(low <= high for low, high in zip(below, budget, strict=True)):
            pieces += [r[low:high] for r, low, high in zip(ranked, below, budget, strict=True)]
            nested.append(budget)
            below = budget
    return torch.cat(pieces), tuple(dict.fromkeys(nested))


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 of reference tokens: what tells two references apart, bit for bit.

    Parameters
    ----------
    tokens : Tensor, shape (B, R, D) or (R, D)
        Any dtype; hashed as float32. Items that repeat the first (several images of one prompt, the halves
        of classifier-free guidance) do not count, so that the batch size does not change the result.

    Returns
    -------
    str
        64 hexadecimal digits.

    Notes
    -----
    One host sync: the tokens are copied to the CPU.

    Examples
    --------
    >>> fingerprint(torch.zeros(1, 4, 8)) == fingerprint(torch.zeros(2, 4, 8))
    True
    """
    items = tokens.detach().to("cpu", torch.float32).contiguous().numpy()
    items = items if items.ndim == 3 else items[None]
    contents = [item.tobytes() for item in items]
    alike = all(content == contents[0] for content in contents)
    digest = hashlib.sha256(f"{items.shape[1:]}".encode())
    for content in contents[:1] if alike else contents:
        digest.update(content)
    return digest.hexdigest()


def _best(scores: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    best, start = [], 0
    for score, count in zip(scores, counts, strict=True):
        best.append(score.sort(descending=True, stable=True).indices[:count] + start)
        start += len(score)
    return torch.cat(best)


def _check_counts(name: str, counts: Sequence[int], scores: Sequence[Tensor]) -> None:
    if len(counts) != len(scores):
        raise ConfigError(f"there must be as many {name} as references, {len(scores)}, got {len(counts)}")
    for i, (count, score) in enumerate(zip(counts, scores, strict=True)):
        if not 0 <= count <= len(score):
            raise BudgetError(f"{name}[{i}] must lie in 0..{len(score)}, the tokens of reference {i}, got {count}")

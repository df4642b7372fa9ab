"""Attention measured in profiling steps: what the reference tokens receive, per probe, and the paper's diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError
from .functional import attention_mass
from .ops.attention_mass.backends import keys_read
from .record import BlockAttention, RunRecord
from .selection import Probe

__all__ = ["AttentionView", "Profile", "block_indices", "first_blocks", "top_quarter"]


@dataclass(frozen=True)
class AttentionView:
    """One attention call of a profiling step, conditional items only.

    Parameters
    ----------
    keys, values : Tensor, shape (B, S, H, C)
        All keys and values of the call, after QK-norm and RoPE.
    generation : Tensor, shape (B, N, H, C), optional
        Queries of the generation tokens, if this call has them.
    reference : Tensor, shape (B, R', H, C), optional
        Queries of the reference rows from the first reference's first row to the last one's last.
    spans : tuple of (int, int)
        Keys of each reference; with `order` one span, of all of them.
    key_mask : Tensor, shape (B, S), bool, optional
    order : Tensor, shape (R,), int64, optional
        Which reference token each key of the span is, counted through all references, where they do
        not lie in order.
    sizes : tuple of int
        Tokens of each reference, with `order`.
    lse, reference_lse : Tensor, shape (B, H, N) and (B, H, R'), float32, optional
        Natural-log LSE of the queries of `generation` and `reference` over all keys that they may attend to, where the
        call's own attention gave it.
    """

    keys: Tensor
    values: Tensor
    generation: Tensor | None
    reference: Tensor | None
    spans: tuple[tuple[int, int], ...]
    key_mask: Tensor | None = None
    order: Tensor | None = None
    sizes: tuple[int, ...] = ()
    lse: Tensor | None = None
    reference_lse: Tensor | None = None

    def in_order(self, rows: Tensor) -> list[Tensor]:
        """Split (..., R), one entry a key of the spans, over the references, tokens in order."""
        if self.order is None:
            first = self.spans[0][0]
            return [rows[..., a - first : b - first] for a, b in self.spans]
        return list(torch.empty_like(rows).index_copy_(-1, self.order, rows).split(self.sizes, dim=-1))


def block_indices(blocks: str | Sequence[int], kinds: Sequence[str]) -> frozenset[int]:
    """The blocks that a probe means, of a model whose blocks are of `kinds` in order.

    "all", "double", "single" or indices. "single" on a model without joint-stream blocks (Qwen)
    means the last two thirds of its blocks.

    Examples
    --------
    >>> sorted(block_indices("single", ["double", "single", "single"]))
    [1, 2]
    """
    if blocks == "all":
        return frozenset(range(len(kinds)))
    if blocks == "single" and "single" not in kinds:
        return frozenset(range(len(kinds) // 3, len(kinds)))
    if isinstance(blocks, str):
        found = frozenset(i for i, kind in enumerate(kinds) if kind == blocks)
        if not found:
            raise ConfigError(f'blocks must be "all", "double", "single" or indices, and exist here; got {blocks!r}')
        return found
    out = frozenset(range(len(kinds))[i] if -len(kinds) <= i < len(kinds) else -1 for i in blocks)
    if not out or -1 in out:
        raise ConfigError(f"block indices must lie within this model's {len(kinds)} blocks, got {tuple(blocks)}")
    return out


class Profile:
    """Sums of the attention that each probe asks for, over the blocks and steps of one run.

    Parameters
    ----------
    probes : sequence of Probe
        Repeated ones count once.
    kinds : sequence of str
        Kind of each attention block in order ("double", "single", ...).
    first : int, optional
        Measure among the first blocks alone: of those that a probe names, or all of them where it
        names none of them. Default anywhere.

    Raises
    ------
    ConfigError
        If a probe's blocks do not exist, or its indices reach beyond the first ones.
    """

    def __init__(self, probes: Sequence[Probe], kinds: Sequence[str], first: int | None = None) -> None:
        self.probes = tuple(dict.fromkeys(probes))
        self.steps = frozenset(step for probe in self.probes for step in probe.steps)
        self._blocks = {probe: block_indices(probe.blocks, kinds) for probe in self.probes}
        if first is not None:
            self._blocks = {probe: _early(probe, found, first) for probe, found in self._blocks.items()}
        self.clear()

    def blocks(self, probe: Probe) -> frozenset[int]:
        """The blocks in which `probe` is measured."""
        return self._blocks[probe]

    def clear(self) -> None:
        """Forget what was measured."""
        self._sums: dict[Probe, Tensor] = {}
        self._terms: dict[Probe, int] = {}
        self._again: int | None = None

    def repeat(self, step: int) -> None:
        """Forget what was measured, and measure everything in `step`."""
        self.clear()
        self._again = step

    def mass(self) -> dict[Probe, Tensor]:
        """What was measured, (R,) float32 each: mean over items, heads, blocks and steps."""
        return {probe: total / self._terms[probe] for probe, total in self._sums.items()}

    def measures(self, step: int, block: int) -> bool:
        """Whether any probe looks at a block in a step."""
        return any(self._looks(probe, step, block) for probe in self.probes)

    def _looks(self, probe: Probe, step: int, block: int) -> bool:
        return step in (*probe.steps, self._again) and block in self._blocks[probe]

    def observe(self, step: int, block: int, view: AttentionView, record: RunRecord) -> None:
        """Measure one attention call; its work and its diagnostics go to `record`."""
        measured: dict[tuple[str, int], list[Tensor]] = {}
        for probe in self.probes:
            queries = view.generation if probe.queries == "generation" else view.reference
            if queries is None or not self._looks(probe, step, block):
                continue
            key = (probe.queries, probe.query_stride)
            if key not in measured:
                measured[key] = _measure(probe, queries, view)
                record.scoring_flops += _work(probe, queries, view)
                if probe.queries == "generation":
                    record.attention.append(_statistics(step, block, [part.mean(dim=0) for part in measured[key]]))
            parts = measured[key]
            if probe.value_norm:
                first, last = view.spans[0][0], view.spans[-1][1]
                norms = view.in_order(view.values[:, first:last].float().norm(dim=-1).transpose(1, 2))
                parts = [part * norm for part, norm in zip(parts, norms, strict=True)]
            mass = torch.cat([part.mean(dim=(0, 1)) for part in parts])
            self._sums[probe] = self._sums[probe] + mass if probe in self._sums else mass
            self._terms[probe] = self._terms.get(probe, 0) + 1


def first_blocks(probes: Sequence[Probe], kinds: Sequence[str], given: int | None = None) -> int:
    """How many first blocks an in-flight profile runs with all tokens: see `SparseRef.profile_blocks`.

    Examples
    --------
    >>> first_blocks([Probe()], ["double"] * 8 + ["single"] * 24), first_blocks([Probe(blocks=(2, 5))], ["single"] * 24)
    (8, 6)
    """
    reach = [1 + max(block_indices(p.blocks, kinds)) for p in probes if not isinstance(p.blocks, str)]
    first = max(reach, default=-(-len(kinds) // 4)) if given is None else given
    if not 0 < first < len(kinds):
        raise ConfigError(
            f"an in-flight profile must end before the last of the model's {len(kinds)} blocks, got {first} first "
            "blocks (profile_blocks, or as many as the selector's indices reach)"
        )
    return first


def _early(probe: Probe, found: frozenset[int], first: int) -> frozenset[int]:
    early = frozenset(i for i in found if i < first)
    if isinstance(probe.blocks, str):
        return early or frozenset(range(first))
    if early != found:
        raise ConfigError(
            f"the measured blocks must lie among the first {first} (profile_blocks), got {tuple(probe.blocks)}"
        )
    return early


def _measure(probe: Probe, queries: Tensor, view: AttentionView) -> list[Tensor]:
    """Mass (B, H, R_i) that the probe's queries pay to each reference."""
    first, last = view.spans[0][0], view.spans[-1][1]
    mask, stride = view.key_mask, probe.query_stride
    if probe.queries == "generation":
        mass = attention_mass(queries, view.keys, (first, last), key_mask=mask, query_stride=stride, lse=view.lse)
        return view.in_order(mass)
    lse, parts = view.reference_lse, []
    for a, b in view.spans:
        rows = slice(a - first, b - first)
        own = None if lse is None else lse[..., rows]
        parts.append(attention_mass(queries[:, rows], view.keys, (a, b), key_mask=mask, query_stride=stride, lse=own))
    return parts


def _work(probe: Probe, queries: Tensor, view: AttentionView) -> float:
    """FLOPs of `_measure`: products with the references' own keys; with every key where the LSE had to be computed."""
    batch, _, heads, channels = queries.shape
    first, last = view.spans[0][0], view.spans[-1][1]
    if probe.queries == "generation":
        parts, lse = [(queries.shape[1], last - first)], view.lse
    else:
        parts, lse = [(b - a, b - a) for a, b in view.spans], view.reference_lse
    products = sum(
        -(-rows // probe.query_stride) * (keys if lse is not None else keys_read(queries, view.keys, keys))
        for rows, keys in parts
    )
    return 2.0 * batch * heads * channels * products


def top_quarter(mass: Tensor) -> Tensor:
    """Share of (H, R) mass in the top 25 % of R, rounded up, (H,)."""
    top = mass.topk(-(-mass.shape[-1] // 4), dim=-1).values.sum(-1)
    return top / mass.sum(-1).clamp_min(torch.finfo(mass.dtype).tiny)


def _statistics(step: int, block: int, parts: list[Tensor]) -> BlockAttention:
    share, entropy, top = [], [], []
    for mass in parts:
        p = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        share.append(mass.sum(-1))
        entropy.append(-torch.special.xlogy(p, p).sum(-1) / torch.log(torch.tensor(2.0)))
        top.append(top_quarter(mass))
    return BlockAttention(step, block, torch.stack(share), torch.stack(entropy), torch.stack(top))

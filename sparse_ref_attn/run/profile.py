"""Attention measured in profiling steps: what the reference tokens receive, per probe, and the paper's diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..config import SparseRef
from ..errors import ConfigError
from ..functional import attention_mass
from ..ops.attention_mass.backends import keys_read
from ..ops.attention_mass.masked import attention_mass_masked
from ..record import BlockAttention, RunRecord
from ..selection import Probe

__all__ = ["AttentionView", "Probing", "Profile", "block_indices", "first_blocks", "probed_mass", "top_quarter"]


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
    masks : mapping of str to Tensor, shape (B or 1, H or 1, N or 1, S), bool or floating
        In place of `key_mask`, where the call has a mask that says more: the rows of the "generation" and of the
        "reference" queries. Floating ones are added to the scores.
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
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    lse: Tensor | None = None
    reference_lse: Tensor | None = None

    def lse_of(self, queries: str) -> Tensor | None:
        """The LSE of the "generation" or the "reference" queries."""
        return self.lse if queries == "generation" else self.reference_lse

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


@dataclass(frozen=True)
class Probing:
    """Where the attention that a configuration asks for is measured on one model.

    Parameters
    ----------
    kinds : tuple of str
        Kind of each attention block in order ("double", "single", ...).
    probes : tuple of Probe
        What is measured, each once.
    where : mapping of Probe to frozenset of int
        Blocks in which each is measured.
    first : int
        With an in-flight profile the number of first blocks that all tokens run through; 0 without.
    """

    kinds: tuple[str, ...]
    probes: tuple[Probe, ...]
    where: Mapping[Probe, frozenset[int]]
    first: int = 0

    @classmethod
    def of(cls, config: SparseRef, kinds: Sequence[str]) -> Probing:
        """What every run of a patched model measures.

        Raises
        ------
        ConfigError
            If a setting names a block that the model does not have, or one beyond the first ones of an in-flight
            profile.
        """
        asked = config.probes()
        first = first_blocks(asked, kinds, config.profile_blocks) if config.profile == "in_flight" else 0
        if config.from_block and config.from_block >= len(kinds):
            raise ConfigError(f"from_block must lie below the model's {len(kinds)} blocks, got {config.from_block}")
        plain = [replace(p, value_norm=False) for p in asked if p.value_norm]
        probes = tuple(dict.fromkeys([*asked, *plain]))
        where = {probe: block_indices(probe.blocks, kinds) for probe in probes}
        if first:
            where = {probe: _early(probe, found, first) for probe, found in where.items()}
        return cls(tuple(kinds), probes, where, first)

    @property
    def steps(self) -> frozenset[int]:
        """Steps that the probes name."""
        return frozenset(step for probe in self.probes for step in probe.steps)


class Profile:
    """Sums of the attention that each probe asks for, over the blocks and steps of one run.

    Parameters
    ----------
    probing : Probing
    """

    def __init__(self, probing: Probing) -> None:
        self._probing = probing
        self._sums: dict[Probe, Tensor] = {}
        self._terms: dict[Probe, int] = {}
        self._again: int | None = None

    @property
    def probes(self) -> tuple[Probe, ...]:
        """What is measured."""
        return self._probing.probes

    def repeat(self, step: int) -> None:
        """Forget what was measured, and measure everything in `step`."""
        self._sums, self._terms, self._again = {}, {}, step

    def mass(self) -> dict[Probe, Tensor]:
        """What was measured, (R,) float32 each: mean over items, heads, blocks and steps."""
        return {probe: total / self._terms[probe] for probe, total in self._sums.items()}

    def measures(self, step: int, block: int) -> bool:
        """Whether any probe looks at a block in a step."""
        return any(self._looks(probe, step, block) for probe in self._probing.probes)

    def _looks(self, probe: Probe, step: int, block: int) -> bool:
        return step in (*probe.steps, self._again) and block in self._probing.where[probe]

    def observe(self, step: int, block: int, view: AttentionView, record: RunRecord) -> None:
        """Measure one attention call; its work and its diagnostics go to `record`."""
        measured: dict[tuple[str, int], list[Tensor]] = {}
        for probe in self._probing.probes:
            queries = view.generation if probe.queries == "generation" else view.reference
            if queries is None or not self._looks(probe, step, block):
                continue
            key = (probe.queries, probe.query_stride)
            if key not in measured:
                measured[key] = probed_mass(probe, queries, view)
                record.scoring_flops += _work(probe, queries, view)
                if probe.queries == "generation":
                    record.attention.append(_statistics(step, block, [part.mean(dim=0) for part in measured[key]]))
            parts = measured[key]
            if probe.value_norm:
                first, last = view.spans[0][0], view.spans[-1][1]
                norms = view.in_order(view.values[:, first:last].float().norm(dim=-1).transpose(1, 2))
                parts = [part * norm for part, norm in zip(parts, norms, strict=True)]
            self._add(probe, torch.cat([part.mean(dim=(0, 1)) for part in parts]))

    def observed(self, step: int, block: int, parts: Sequence[Tensor], record: RunRecord) -> None:
        """Take what somebody else measured of the generation's queries: the heads' mean of the mass of each
        reference's tokens, (B, R_i)."""
        record.attention.append(_statistics(step, block, [part.mean(dim=0)[None] for part in parts]))
        for probe in self._probing.probes:
            if self._looks(probe, step, block):
                self._add(probe, torch.cat([part.mean(dim=0) for part in parts]))

    def _add(self, probe: Probe, mass: Tensor) -> None:
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


def probed_mass(probe: Probe, queries: Tensor, view: AttentionView) -> list[Tensor]:
    """Mass (B, H, R_i) that the probe's queries pay to each reference."""
    first, last = view.spans[0][0], view.spans[-1][1]
    if probe.queries == "generation":
        return view.in_order(_mass(probe, slice(None), queries, view, (first, last)))
    return [_mass(probe, slice(a - first, b - first), queries, view, (a, b)) for a, b in view.spans]


def _mass(probe: Probe, rows: slice, queries: Tensor, view: AttentionView, span: tuple[int, int]) -> Tensor:
    """Mass (B, H, R) that `rows` of the probe's queries pay to the keys of `span`."""
    queries, mask, lse = queries[:, rows], view.masks.get(probe.queries), view.lse_of(probe.queries)
    if mask is None:
        own = None if lse is None else lse[..., rows]
        stride = probe.query_stride
        return attention_mass(queries, view.keys, span, key_mask=view.key_mask, query_stride=stride, lse=own)
    mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
    return attention_mass_masked(queries, view.keys, span, mask, probe.query_stride)


def _work(probe: Probe, queries: Tensor, view: AttentionView) -> float:
    """FLOPs of `probed_mass`: products with the references' own keys; with every key where the LSE was computed too."""
    batch, _, heads, channels = queries.shape
    first, last = view.spans[0][0], view.spans[-1][1]
    parts = [(b - a, b - a) for a, b in view.spans]
    if probe.queries == "generation":
        parts = [(queries.shape[1], last - first)]
    masked, given = probe.queries in view.masks, view.lse_of(probe.queries) is not None

    def read(own: int) -> int:
        if masked:
            return view.keys.shape[1]
        return own if given else keys_read(queries, view.keys, own)

    products = sum(-(-rows // probe.query_stride) * read(own) for rows, own in parts)
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

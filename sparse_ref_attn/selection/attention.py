"""Selectors that read attention measured in dense profiling steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..checks import is_int
from ..errors import ConfigError, LayoutError
from .base import Probe, References, Selector

__all__ = ["AttentionMass", "SelfAttention"]


@dataclass(frozen=True)
class AttentionMass(Selector):
    r"""Score a token by the attention that the generation tokens pay to it (ReCAST).

    .. math::
        s^{(l)}(k) = \frac{1}{N_g} \sum_{j=1}^{N_g} A^{(l)}_{\mathrm{gen} \to \mathrm{ref}}(j, k) \qquad (2)

        s(k) = \frac{1}{|L|} \sum_{l \in L} s^{(l)}(k) \qquad (3)

    A is the softmax over the joint sequence, averaged over heads; L are `blocks`. With `value_norm` each head's
    term is multiplied by the norm of the token's value in that head, as in ToPi.

    Parameters
    ----------
    blocks : {"single", "double", "all"} or sequence of int
        L: the single-stream blocks (ReCAST's choice), the joint-stream blocks, every block, or indices >= 0
        over all blocks in order of execution. A list or range becomes a tuple.
    steps : sequence of int
        Steps, >= 0, that run dense, are measured and averaged. Each costs a full step, unless
        ``SparseRef(profile="in_flight")`` measures in its first blocks alone.
    query_stride : int
        Use every n-th generation token as a query, >= 1.
    value_norm : bool
        Weight by the value norm.

    Raises
    ------
    ConfigError
        If a setting is out of range.
    LayoutError
        At scoring, if the attention was not measured.

    References
    ----------
    ReCAST, eq. (2)-(3); value norms: ToPi, arXiv 2602.01609.

    Examples
    --------
    >>> AttentionMass(blocks=range(2, 4)).probes()[0].blocks
    (2, 3)
    """

    blocks: str | Sequence[int] = "single"
    steps: Sequence[int] = (0,)
    query_stride: int = 1
    value_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _blocks(self.blocks))
        object.__setattr__(self, "steps", _indices("steps", self.steps))
        if not is_int(self.query_stride, 1):
            raise ConfigError(f"query_stride must be an int of at least 1, got {self.query_stride!r}")
        if not isinstance(self.value_norm, bool):
            raise ConfigError(f"value_norm must be True or False, got {self.value_norm!r}")

    def probes(self) -> tuple[Probe, ...]:
        return (Probe("generation", _blocks(self.blocks), tuple(self.steps), self.query_stride, self.value_norm),)

    def score(self, references: References) -> list[Tensor]:
        return _measured(references, self.probes()[0])


@dataclass(frozen=True)
class SelfAttention(Selector):
    r"""Score a token by the attention it receives from the tokens of its own reference.

    .. math:: s(k) = \frac{1}{|L| R_i} \sum_{l \in L} \sum_{j \in \mathrm{ref}\ i} A^{(l)}(j, k)

    The criterion of FastV, which prunes a language model's image tokens by the attention they receive, with
    the reference's own tokens as queries. It knows the reference but not what the prompt asks of it.

    Parameters
    ----------
    blocks, steps
        As in `AttentionMass`.

    Raises
    ------
    ConfigError
        If a setting is out of range.
    LayoutError
        At scoring, if the attention was not measured.

    References
    ----------
    L. Chen et al., An Image is Worth 1/2 Tokens After Layer 2 (FastV), arXiv 2403.06764.

    Examples
    --------
    >>> SelfAttention(blocks="all").probes()[0].queries
    'reference'
    """

    blocks: str | Sequence[int] = "single"
    steps: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _blocks(self.blocks))
        object.__setattr__(self, "steps", _indices("steps", self.steps))

    def probes(self) -> tuple[Probe, ...]:
        return (Probe("reference", _blocks(self.blocks), tuple(self.steps)),)

    def score(self, references: References) -> list[Tensor]:
        return _measured(references, self.probes()[0])


def _blocks(blocks: str | Sequence[int]) -> str | tuple[int, ...]:
    if isinstance(blocks, str):
        if blocks not in ("all", "double", "single"):
            raise ConfigError(f'blocks must be "all", "double", "single" or indices, got {blocks!r}')
        return blocks
    return _indices("blocks", blocks)


def _indices(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise ConfigError(f"{name} must be a sequence of ints, got {values!r}")
    try:
        indices = tuple(values)
    except TypeError as error:  # a tensor without a dimension
        raise ConfigError(f"{name} must be a sequence of ints, got {values!r}") from error
    if not indices or not all(is_int(i, 0) for i in indices):
        raise ConfigError(f"{name} must be one or more ints of at least 0, got {indices}")
    if len(set(indices)) != len(indices):
        raise ConfigError(f"{name} must not repeat, got {indices}")
    return indices


def _measured(references: References, probe: Probe) -> list[Tensor]:
    if probe not in references.attention:
        raise LayoutError(
            f"attention must be measured in a profiling step before it can score: {probe} is not among the "
            f"{len(references.attention)} measured probes"
        )
    attention = references.attention[probe]
    if attention.shape != (references.layout.reference_tokens,):
        raise LayoutError(
            f"measured attention must have shape ({references.layout.reference_tokens},), got {tuple(attention.shape)}"
        )
    return references.split(attention.float())

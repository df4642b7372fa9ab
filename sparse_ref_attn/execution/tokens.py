"""Rows that leave the sequence, at the transformer's input or at a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import is_int
from ..errors import ConfigError

__all__ = ["Tokens", "check_every"]


@dataclass(frozen=True)
class Tokens:
    """Dropped rows leave the sequence, so that blocks run on a shorter one.

    Parameters
    ----------
    from_block : int
        Block from which on the dropped tokens are gone: all tokens run through the blocks before it, at every step.
        0, the default, is the transformer's input. Below the number of blocks.
    in_flight : bool or int
        Measure attention in the first blocks of step 0, after which the dropped tokens leave that very step, instead of
        in whole dense steps; for models of few steps, where a dense step is a large part of the run. An int is the
        number of first blocks that all tokens run through and that are measured, at least 1 and below the number of
        blocks. True: as many as the block indices of the selector reach; where it gives none, a quarter of all,
        rounded up (15 of Kontext's 57, 8 of klein-9b's 32, 15 of Qwen-Image-Edit's 60). Blocks that a selector names
        ("single", "double", "all") are those among the first; where none is, all the first ones.
    rerank_every : int, optional
        Measure and rank again in a dense step every n steps after the last profiling step. Default never.

    Raises
    ------
    ConfigError
        For a value outside its range, and for `in_flight` with `rerank_every`.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> sra.SparseRef("mass", 0.25, execute=Tokens(in_flight=True)).describe()
    "AttentionMass, Constant(keep=0.25, per='reference'), tokens, profiled in flight"
    """

    from_block: int = 0
    in_flight: bool | int = False
    rerank_every: int | None = None

    def __post_init__(self) -> None:
        if not is_int(self.from_block, 0):
            raise ConfigError(f"from_block must be an int of at least 0, got {self.from_block!r}")
        if not isinstance(self.in_flight, bool) and not is_int(self.in_flight, 1):
            raise ConfigError(f"in_flight must be a bool or an int of at least 1, got {self.in_flight!r}")
        check_every(self.rerank_every)
        if self.in_flight and self.rerank_every is not None:
            raise ConfigError(
                'profile="in_flight" goes with execute="tokens" and without rerank_every, got '
                f"'tokens' and {self.rerank_every}"
            )

    def check_probes(self, probes: Sequence[Any], selector: str) -> None:
        """Raise ConfigError where attention is measured in flight, and a selector's probes cannot be."""
        if self.in_flight and not probes:
            raise ConfigError(
                'profile="in_flight" needs a selector (or a guard) that measures attention, got '
                f"{selector}, which needs no profiling at all"
            )
        for probe in probes if self.in_flight else ():
            if tuple(probe.steps) != (0,):
                raise ConfigError(f'profile="in_flight" measures in step 0 alone, got steps {tuple(probe.steps)}')

    @property
    def name(self) -> str:
        return "tokens"


def check_every(every: object) -> None:
    if every is not None and not is_int(every, 1):
        raise ConfigError(f"rerank_every must be an int of at least 1, got {every!r}")

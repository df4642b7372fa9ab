"""FLOPs of a step, of a run and of scoring, and the time bound that follows from them.

A FLOP is one multiplication or one addition; element-wise work is not counted, as in
`torch.utils.flop_counter.FlopCounterMode`, with which the counts agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import ConfigError
from .shape import ModelShape
from .tokens import StepTokens

__all__ = ["Flops", "bound_seconds", "layered_flops", "run_flops", "scoring_flops", "step_flops"]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations: those of Linear layers, and those of attention's two products.

    The two run at different rates and scale differently with the tokens, so they are never added before time is
    derived from them (`bound_seconds`).

    Examples
    --------
    >>> (2 * Flops(matmul=3, attention=1) + Flops(1, 1)).total
    10
    """

    matmul: int
    attention: int

    @property
    def total(self) -> int:
        return self.matmul + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matmul + other.matmul, self.attention + other.attention)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.matmul * times, self.attention * times)

    __rmul__ = __mul__


def step_flops(shape: ModelShape, tokens: StepTokens, batch: int = 1) -> Flops:
    """FLOPs of one transformer call.

    Attention takes ``4 H C`` FLOPs for each query-key pair of each layer: S x (S + cached) pairs, or on a split step
    (T + G) x (T + G + R) + R x R; layers before the joint ones add T x T + G x G + R x R, and text that is looked at
    in attention of its own (G + R) x T in each layer.
    Rows that leave by depth count in the embedder and the blocks before they leave.

    Parameters
    ----------
    shape : ModelShape
    tokens : StepTokens
        Rows of one item.
    batch : int
        Items B in the call (2 with batched classifier-free guidance).

    Raises
    ------
    ConfigError
        If rows leave at a block that the shape does not have.

    Examples
    --------
    >>> one = ModelShape("one", image=10, text=10, joint=0, item=5, output=2, attention_layers=1, heads=1, head_dim=4,
    ...     parameter_bytes=0, dtype_bytes=2)
    >>> step_flops(one, StepTokens(text=1, generation=2, references=2))
    Flops(matmul=126, attention=400)
    """
    image = tokens.generation + tokens.references
    output = tokens.generation if tokens.split or shape.output_rows == "generation" else image
    own_timestep = tokens.split or shape.reference_timestep
    macs = (
        shape.image * image
        + shape.text * (tokens.text + tokens.apart)
        + shape.joint * tokens.joint
        + shape.output * output
        + shape.item
        + shape.reference_item * (2 if own_timestep else 1)
    )
    if tokens.from_block:
        if tokens.from_block >= len(shape.leading):
            raise ConfigError(
                f"rows must leave before the last of the {len(shape.leading)} blocks that the shape of {shape.name} "
                f"knows, got block {tokens.from_block}"
            )
        macs += shape.leading[tokens.from_block] * tokens.dropped
    pairs = tokens.pairs(shape.attention_layers) + shape.own_attention_layers * tokens.own_pairs
    return Flops(matmul=2 * batch * macs, attention=4 * batch * shape.heads * shape.head_dim * pairs)


def layered_flops(shape: ModelShape, tokens: StepTokens, cached: Sequence[int], batch: int = 1) -> Flops:
    """As `step_flops`, of a call whose attention layers read different numbers of stored reference tokens.

    Parameters
    ----------
    shape, tokens, batch
        As in `step_flops`; ``tokens.cached`` does not count.
    cached : sequence of int
        Stored tokens that each attention layer reads.
    """
    one = replace(shape, attention_layers=1, own_attention_layers=0)
    attention = sum(step_flops(one, replace(tokens, cached=n), batch).attention for n in cached)
    attention += step_flops(replace(shape, attention_layers=0), tokens, batch).attention
    return Flops(step_flops(shape, tokens, batch).matmul, attention)


def scoring_flops(shape: ModelShape, queries: int, keys: int, blocks: int, batch: int = 1) -> Flops:
    """FLOPs of measuring attention mass: one product, ``2 queries keys H C`` for each scored block.

    Parameters
    ----------
    shape : ModelShape
    queries : int
        Scored queries: G, divided by the query stride.
    keys : int
        S when scoring normalises by itself; R when it has the log-sum-exp of the attention kernel.
    blocks : int
        Scored attention layers.
    batch : int
        Scored items.
    """
    return Flops(0, 2 * batch * blocks * queries * keys * shape.heads * shape.head_dim)


def run_flops(
    shape: ModelShape, steps: Iterable[StepTokens], batch: int = 1, calls: int = 1, scoring: Flops | None = None
) -> Flops:
    """FLOPs of a whole run: every step, dense profiling steps included as the dense steps they are, and the scoring.

    Parameters
    ----------
    shape : ModelShape
    steps : iterable of StepTokens
        The rows of each step.
    batch, calls : int
        Items a call, and transformer calls a step (2 with sequential classifier-free guidance).
    scoring : Flops, optional
        `scoring_flops`, summed over the profiling steps.
    """
    total = Flops(0, 0) if scoring is None else scoring
    for tokens in steps:
        total = total + step_flops(shape, tokens, batch * calls)
    return total


def bound_seconds(
    dense: Flops,
    sparse: Flops,
    dense_attention_seconds: float,
    dense_remaining_seconds: float,
    fixed_seconds: float = 0.0,
) -> float:
    """The time a sparse run would take if nothing were lost: the dense run's times, each scaled by its own work.

    ``attention_time * sparse.attention / dense.attention + remaining_time * sparse.matmul / dense.matmul + fixed``

    Attention and matrix products run at different rates, so the ratio of total FLOPs is no bound. Measured over bound
    should lie in 0.90-1.05.

    Parameters
    ----------
    dense, sparse : Flops
        Of one step, or of whole runs (`run_flops`), the sparse one with its profiling steps and scoring.
    dense_attention_seconds : float
        Measured inside attention during the dense step or run.
    dense_remaining_seconds : float
        The rest of the dense transformer time; element-wise work scales with the rows, as matrix products do.
    fixed_seconds : float
        Time that does not depend on the reference tokens: text encoder, VAE, the library's own steps.

    Raises
    ------
    ConfigError
        If a time is negative or the dense work is zero.

    Examples
    --------
    >>> bound_seconds(Flops(100, 40), Flops(50, 10), dense_attention_seconds=2.0, dense_remaining_seconds=4.0)
    2.5
    """
    if min(dense_attention_seconds, dense_remaining_seconds, fixed_seconds) < 0:
        raise ConfigError(
            "times must be >= 0, got "
            f"{dense_attention_seconds} s in attention, {dense_remaining_seconds} s remaining, {fixed_seconds} s fixed"
        )
    if dense.attention <= 0 or dense.matmul <= 0:
        raise ConfigError(f"the dense run must have attention and matmul work, got {dense}")
    attention = dense_attention_seconds * sparse.attention / dense.attention
    return attention + dense_remaining_seconds * sparse.matmul / dense.matmul + fixed_seconds

"""What an estimate says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..cost import Flops, Memory
from ..record import mean_over_blocks
from ..report.page import page, table

__all__ = ["Estimate", "RunMemory"]


@dataclass(frozen=True)
class RunMemory:
    """Bytes at the peak of a run, and what a cache of reference keys and values would hold.

    Parameters
    ----------
    dense, sparse : Memory
        Of the largest step. A run with a dense profiling step peaks there, so its peak is the dense one.
    sparse_step : Memory
        Of the largest step that drops tokens; `dense` when none does.
    dense_reference_kv, sparse_reference_kv : int
        Keys and values of the reference tokens over all layers and branches of guidance, all of them and the most that
        a sparse step keeps. Nothing is stored when tokens are dropped at the input: this is what a reference cache
        would take.
    room : int
        Rows of text and generation beside the stored ones, with ``execute="cache"`` or "both".
    tiles : int, optional
        Means of cells and what each tile reads, with ``Cache(per="tile")``, which holds every token's rows besides;
        None without.
    """

    dense: Memory
    sparse: Memory
    sparse_step: Memory
    dense_reference_kv: int
    sparse_reference_kv: int
    room: int = 0
    tiles: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A run in numbers, made by `estimate`.

    Parameters
    ----------
    model, config : str
        The model family, and the configuration in one line.
    text, generation : int
        Text tokens, and tokens of the image being made.
    references : tuple of int
        Tokens of each reference.
    kinds : tuple of {"dense", "profile", "in_flight", "sparse", "cached"}
        What each step does; "profile" is dense and measures attention, "in_flight" is so in its first blocks, "cached"
        reads stored keys and values.
    tokens : tuple of int
        Reference tokens that take part in each step, all references together.
    from_block : tuple of int
        Block of each step from which on only these take part, 0 for the transformer's input.
    blocks : int
        Blocks of the transformer.
    dense, sparse : Flops
        Of the run with every token, and as it would run, profiling and `scoring` included.
    scoring : Flops
        Of measuring attention.
    memory : RunMemory
        In bytes; activations are an estimate to about 15 % (`cost.step_memory`).
    notes : tuple of str
        What the numbers leave out, in words.
    """

    model: str
    config: str
    text: int
    generation: int
    references: tuple[int, ...]
    kinds: tuple[str, ...]
    tokens: tuple[int, ...]
    from_block: tuple[int, ...]
    blocks: int
    dense: Flops
    sparse: Flops
    scoring: Flops
    memory: RunMemory
    notes: tuple[str, ...] = ()

    @property
    def mean_tokens(self) -> float:
        """Reference tokens a step, averaged over all steps, dense ones included, and over the blocks of a step."""
        total, by_step = sum(self.references), zip(self.tokens, self.from_block, strict=True)
        return sum(mean_over_blocks(kept, total, first, self.blocks) for kept, first in by_step) / len(self.tokens)

    @property
    def flop_ratio(self) -> float:
        """Dense work over sparse work, at least 1 for a budget that saves anything.

        Not the bound of the speed-up: attention and matrix products run at different rates (`cost.bound_seconds`).
        """
        return self.dense.total / self.sparse.total

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types, with `mean_tokens` and `flop_ratio`."""
        out = asdict(self)
        for name in ("references", "kinds", "tokens", "from_block", "notes"):
            out[name] = list(out[name])
        return out | {"mean_tokens": self.mean_tokens, "flop_ratio": self.flop_ratio}

    def summary(self) -> str:
        """The estimate as text, a few lines."""
        facts = self._facts()
        indent = max(len(name) for name, _ in facts) + 2
        lines = [f"{name:<{indent}}{value}" for name, value in [*facts, *(("note", note) for note in self.notes)]]
        return "\n".join([f"{self.model}: {self.config}", *lines])

    def _repr_html_(self) -> str:
        return page(f"{self.model}: {self.config}", table((), self._facts(), left=(0, 1)), notes=self.notes)

    def _facts(self) -> list[tuple[str, str]]:
        total, memory = sum(self.references), self.memory
        drops = ("sparse", "in_flight", "cached")
        dropping = [n for n, kind in zip(self.tokens, self.kinds, strict=True) if kind in drops]
        sparse = f", {min(dropping)} to {max(dropping)} on sparse steps" if dropping else ""
        room = f"and {_gb(memory.room)} of room beside them" if memory.room else "if they were stored"
        kept = f"{_gb(memory.sparse_reference_kv)} for the kept ones, {room}"
        if memory.tiles is not None:
            kept = f"all of them held, and {_gb(memory.tiles)} of means and of what each tile reads"
        return [
            (
                "tokens",
                f"{self.text} text, {self.generation} generation, {' + '.join(map(str, self.references))} reference",
            ),
            (
                "steps",
                f"{len(self.kinds)}: {self.kinds.count('sparse')} sparse, {self.kinds.count('cached')} cached, "
                f"{self.kinds.count('profile')} profiling, {self.kinds.count('in_flight')} profiling in flight, "
                f"{self.kinds.count('dense')} dense",
            ),
            ("kept", f"{self.mean_tokens:.0f} of {total} reference tokens on average{sparse}"),
            (
                "work",
                f"{self.dense.total / 1e12:.1f} TFLOP dense, {self.sparse.total / 1e12:.1f} sparse "
                f"({self.scoring.total / 1e12:.1f} of it scoring): FLOP ratio {self.flop_ratio:.2f}",
            ),
            (
                "memory",
                f"of the transformer: {_gb(memory.dense.parameters)} parameters; activations "
                f"{_gb(memory.dense.activations)} dense, {_gb(memory.sparse_step.activations)} on sparse steps; "
                f"peak {_gb(memory.dense.total)} dense, {_gb(memory.sparse.total)} sparse; "
                "text encoders and VAE are not in it",
            ),
            (
                "cached K/V",
                f"{_gb(memory.dense_reference_kv)} for all reference tokens, {kept}",
            ),
        ]


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"

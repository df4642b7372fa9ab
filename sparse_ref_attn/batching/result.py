"""What a batch returns: the pictures, and a report for each item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import SparseRefError
from ..patching.handle import PatchHandle
from ..report.page import page, table

__all__ = ["BatchResult"]

HEADER = ("item", "references", "tokens", "kept", "steps", "FLOPs")


@dataclass(frozen=True)
class BatchResult:
    """Pictures and reports of `batch`, in the order of the items.

    Attributes
    ----------
    outputs : list
        What each item's pipeline call returned.
    handles : list of PatchHandle
        Each item's report: `summary()`, `record`, `save_overlay()`, `ranking`. The transformer time
        in it is that of the joined calls, which the items share.
    joined, alone : int
        Transformer calls for several items at once, and for one.
    padding : float
        Share of the rows of joined calls that belong to no item, in [0, 1); 0 where items are packed.
    """

    outputs: list[Any]
    handles: list[PatchHandle]
    joined: int
    alone: int
    padding: float = 0.0

    @property
    def images(self) -> list[Any]:
        """The pictures of all items, as the pipeline makes them."""
        return [
            image for output in self.outputs for image in (output[0] if isinstance(output, tuple) else output.images)
        ]

    def summary(self) -> str:
        """A line an item: references, their tokens, how many were kept on average, steps, and the FLOP ratio.

        The ratio is dense over sparse, of the item by itself.
        """
        widths = (4, 10, 6, 6, 5, 6)
        rows = [HEADER, *self._rows()]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, self._calls()])

    def _repr_html_(self) -> str:
        return page("Batch", table(HEADER, self._rows(), left=()), notes=[self._calls()])

    def _rows(self) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = []
        for i, handle in enumerate(self.handles):
            try:
                record = handle.record
            except SparseRefError:
                found.append((str(i), "0", "0", "-", "-", "-"))
                continue
            kept = sum(step.kept for step in record.steps) / len(record.steps)
            flops = handle.flops()
            ratio = "-" if flops is None else f"{flops.ratio:.2f}x"
            layout = record.layout
            counts = (i, len(layout.references), layout.reference_tokens)
            found.append((*map(str, counts), f"{kept:.0f}", str(len(record.steps)), ratio))
        return found

    def _calls(self) -> str:
        return (
            f"transformer calls: {self.joined} for several items at once ({self.padding:.0%} of their rows padding), "
            f"{self.alone} for one"
        )

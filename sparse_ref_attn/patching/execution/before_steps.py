"""What cannot be where references run before the steps, in calls of their own."""

from __future__ import annotations

from ...adapters.base import Adapter
from ...config import SparseRef
from ...errors import IncompatibleError
from ...run import Probing
from ...selection import Reducer

__all__ = ["check_before_steps"]


def check_before_steps(adapter: Adapter, config: SparseRef, probing: Probing) -> None:
    """Raise IncompatibleError where a configuration needs the references' own rows in a step."""
    why = None
    if isinstance(config.select, Reducer):
        why = f"{config.select} changes them: use a selector, which keeps some as they are"
    elif any(probe.queries == "reference" for probe in probing.probes):
        why = f"{config.select} measures their attention: use a selector of the generation's attention, or of none"
    if why is not None:
        raise IncompatibleError(
            f"{adapter.name} runs its references before the steps, none of which has their rows, and {why}"
        )

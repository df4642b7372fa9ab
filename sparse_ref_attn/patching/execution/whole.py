"""What cannot be where a model's references always run whole."""

from __future__ import annotations

from ...adapters.base import Adapter
from ...config import SparseRef
from ...errors import IncompatibleError
from ...run import Probing
from ...selection import Reducer

__all__ = ["check_whole"]


def check_whole(config: SparseRef, probing: Probing, adapter: Adapter) -> None:
    """Raise IncompatibleError where a configuration needs rows that a model of such references does not have."""
    assert adapter.cache is not None
    why = None
    if isinstance(config.select, Reducer):
        why = f"{config.select} changes their tokens: use a selector, which keeps some as they are"
    elif any(probe.queries == "reference" for probe in probing.probes):
        why = f"{config.select} measures their own attention: use a selector of the generation's, or of none"
    elif config.per == "tile" and adapter.cache.text:
        why = 'per="tile" needs the text\'s own rows in the steps that read, and these are kept too: use per="run"'
    if why is not None:
        raise IncompatibleError(f"{adapter.name}: {adapter.cache.whole}, and {why}")

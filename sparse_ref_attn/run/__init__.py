"""One generation: what each step does, how many tokens it keeps, and which. Nothing here knows a model."""

from .budgeting import Budgeting, Counts, covering
from .plan import Plan
from .profile import AttentionView, Probing
from .refreshing import Refreshing
from .run import Run
from .timeline import Timeline

__all__ = ["AttentionView", "Budgeting", "Counts", "Plan", "Probing", "Refreshing", "Run", "Timeline", "covering"]

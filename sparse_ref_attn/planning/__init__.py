"""Which setting to take: chosen among the candidates by what they lose on the frontier and what they cost here."""

from .api import plan
from .chooser import fastest_within, known, least_loss
from .result import FewerSteps, Option, RunPlan

__all__ = ["FewerSteps", "Option", "RunPlan", "fastest_within", "known", "least_loss", "plan"]

"""Which backend "auto" takes, by what was seen on the device where it runs (see `judge`)."""

from .dispatch import JUDGED, fault_of, order_of, prepare, verdict_of
from .judge import Verdict, judge
from .kind import Kind, size_class
from .store import forget

__all__ = [
    "JUDGED",
    "Kind",
    "Verdict",
    "fault_of",
    "forget",
    "judge",
    "order_of",
    "prepare",
    "size_class",
    "verdict_of",
]

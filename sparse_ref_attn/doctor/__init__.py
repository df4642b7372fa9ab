"""What is installed, what it makes possible here, and why the rest is not."""

from .diagnosis import Ability, backends, diagnose, report
from .hardware import device
from .packages import absent_module, missing, versions
from .verdicts import verdict_lines, verify

__all__ = [
    "Ability", "absent_module", "backends", "device", "diagnose", "missing", "report", "verdict_lines", "verify",
    "versions",
]  # fmt: skip

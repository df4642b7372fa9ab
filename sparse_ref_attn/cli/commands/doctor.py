"""The arguments of ``sra doctor``."""

from __future__ import annotations

from ..parsing import Commands, later

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("doctor", help="what is installed, and what is possible here")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--verify", action="store_true", help="compare every backend with float64 on this device, time them, keep that"
    )
    parser.set_defaults(run=later("diagnosing", "diagnose"))

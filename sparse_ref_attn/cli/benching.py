"""``sra bench``: the benchmarks of a checkout."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from ..errors import ConfigError

__all__ = ["bench"]

ROOT = Path(__file__).resolve().parents[2]
"""What this package lies in: a checkout, or a site-packages folder."""


def bench(options: argparse.Namespace) -> int:
    """Hand everything after ``sra bench`` to ``python -m benchmarks`` of the checkout that this package is part of.

    Raises
    ------
    ConfigError
        If the package is not part of a checkout, or another package named benchmarks stands in the way.
    """
    folder = ROOT / "benchmarks"
    if not (folder / "cli.py").is_file():
        raise ConfigError(
            "sra bench needs a checkout of the repository, because benchmarks/ is not part of the installed package, "
            f"got one in {ROOT}. Clone it and pip install -e . there, or run python -m sparse_ref_attn bench in it"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    found = importlib.import_module("benchmarks.cli")
    if Path(found.__file__ or "").parent != folder:
        raise ConfigError(f"benchmarks must be that of the checkout, {folder}, got {found.__file__}")
    return int(found.main(options.arguments, prog="sra bench"))

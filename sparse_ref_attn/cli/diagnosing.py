"""``sra doctor``: what it does with its arguments."""

from __future__ import annotations

import argparse
import json

from .. import doctor
from .terminal import show

__all__ = ["diagnose"]


def diagnose(options: argparse.Namespace) -> None:
    """What is installed, and what is possible here; or what each backend of the ops does here."""
    if options.verify:
        if options.json:
            print(json.dumps(list(doctor.verify()), indent=2))
            return
        for line in doctor.verdict_lines():
            print(line, flush=True)
        return
    if options.json:
        print(json.dumps(doctor.diagnose(), indent=2))
    else:
        show(doctor.report())

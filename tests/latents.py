"""The cases for tests that look at no picture: their calls return latents unless asked for pictures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tests import pipelines

__all__ = ["CASES", "each_case"]

CASES = {name: replace(case, output_type="latent") for name, case in pipelines.CASES.items()}
each_case = partial(pipelines.each_case, cases=CASES)

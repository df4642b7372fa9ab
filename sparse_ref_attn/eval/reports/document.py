"""The document of a comparison: what was run where, the table, and every run's report."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...adapters.weights import weights_fingerprint
from ...errors import IncompatibleError
from ...extras import versions
from ...hooks.compiled import unwrap
from ...models import adapter_for
from ..comparison import Comparison
from ..equal_time import Rivals
from ..method_rows import Row
from ..metrics import Metric
from .schema import NAME, VERSION

__all__ = ["about_pipeline", "document"]

_PICTURES = ("image", "generator")
"""Arguments of a pipeline's call that are no JSON types."""


def about_pipeline(
    pipe: Any, model: str | None, device: str, arguments: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    """What ran where, of which everything measured depends, as JSON types.

    Parameters
    ----------
    pipe : diffusers pipeline
        Not patched.
    model : str, optional
        Path or hub id; None for a built-in one.
    device : str
        In words.
    arguments : mapping
        Of its call, with "image".
    steps : int
    """
    transformer, images = unwrap(pipe.transformer), arguments["image"]
    config: Any = transformer.config
    built = {name: value for name, value in config.items() if not name.startswith("_")}
    built_text = json.dumps(built, sort_keys=True, default=lambda value: type(value).__qualname__)
    try:
        weights = weights_fingerprint(transformer)
    except IncompatibleError:
        weights = None
    return {
        "pipeline": type(pipe).__name__,
        "model": model,
        "transformer": {
            "class": type(transformer).__name__,
            "adapter": adapter_for(transformer).name,
            "dtype": str(transformer.dtype).removeprefix("torch."),
            "weights": weights,
            "config": hashlib.sha256(built_text.encode()).hexdigest(),
        },
        "device": device,
        "arguments": {k: v for k, v in arguments.items() if k not in _PICTURES} | {"steps": steps},
        "references": [list(image.size) for image in (images if isinstance(images, (list, tuple)) else [images])],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": versions(),
    }


def document(
    results: Mapping[str, Comparison],
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    about: Mapping[str, Any],
    *,
    rivals: Rivals | None = None,
    refused: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A comparison as the JSON types of ``assets/report.schema.json``.

    Parameters
    ----------
    results : mapping of str to Comparison
        By method, with dense runs.
    rows : sequence of Row
        Of `method_rows.rows_of`, dense first.
    metrics : sequence of Metric
        That the rows have.
    about : mapping
        `about_pipeline`, "seed" and "repeats", and further JSON types.
    rivals : Rivals, optional
        Runs in fewer steps and under step caches, whose rows are among `rows`.
    refused : mapping of str to str, optional
        Methods that could not run, and why.
    """
    first = next(iter(results.values()))
    layout = first.handle.record.layout
    found = {
        "schema": NAME,
        "version": VERSION,
        "about": dict(about),
        "call": {
            "output": list(first.sparse_image.size),
            "text_tokens": layout.text,
            "generation_tokens": layout.generation[1],
            "reference_tokens": list(layout.sizes),
            "batch": first.handle.record.batch,
        },
        "metrics": [{"name": each.name, "higher_is_better": each.higher_is_better} for each in metrics],
        "rows": [dict(row) for row in rows],
        "refused": dict(refused or {}),
        "runs": {name: {**result.to_dict(), "run": result.summary("dict")} for name, result in results.items()},
    }
    if rivals is not None:
        found["rivals"] = rivals.to_dict()
    return _finite(found)


def _finite(value: Any) -> Any:
    """JSON knows no infinity, which is the PSNR of equal pictures."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

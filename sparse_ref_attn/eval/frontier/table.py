"""The frontier as a table: every setting, what to write for it, what it loses, and what it saves."""

from __future__ import annotations

from collections.abc import Sequence

from ...candidates import DENSE
from ...frontier import Point
from .listed import GEOMETRIES, setting_of

__all__ = ["grouped", "markdown", "speed"]

Place = tuple[str, int, int]
Settings = dict[Place, list[Point]]
"""Points of each key, number of steps and of the dense run's."""


def grouped(points: Sequence[Point]) -> Settings:
    """The points of each setting that can be made here, by key, steps and those of its base."""
    found: Settings = {}
    for point in points:
        if setting_of(point.setting) is not None:
            found.setdefault((point.setting, point.steps, point.base_steps), []).append(point)
    return found


def speed(place: Place, model: str, references: int) -> float:
    """Dense work over that of a setting, by key, steps and those of its base, at a published model's sizes."""
    key, steps, base = place
    setting = setting_of(key, steps if steps < base else None)
    assert setting is not None
    return setting.flop_ratio(base, model, references)


def markdown(points: Sequence[Point]) -> str:
    """A line for each setting, the least work of FLUX.1 Kontext with one reference last.

    The FLOP ratios are those of published sizes with 1, 2 and 4 references of 1024 x 1024. Losses are paired
    differences to the dense run, below 0 where something is lost, with 95 % intervals; beside them stands the picture's
    PSNR against the dense one.
    """
    settings = grouped(points)
    groups = sorted({(p.family, p.references) for own in settings.values() for p in own})
    models = list(dict.fromkeys(model for model, _ in GEOMETRIES))
    counts = list(dict.fromkeys(count for _, count in GEOMETRIES))
    titles = [f"{model}, {' / '.join(map(str, counts))} references" for model in models]
    losses = [f"{family}, {count} reference{'s' * (count > 1)}: subject; picture, dB" for family, count in groups]
    lines = [
        f"| setting | steps | {' | '.join(titles + losses)} | examples | what to write |",
        "|---|---|" + "--:|" * (len(titles) + len(losses) + 1) + "---|",
    ]
    for (key, steps, base), own in sorted(settings.items(), key=lambda item: speed(item[0], *GEOMETRIES[0])):
        cells = [key if key != DENSE else "fewer steps", f"{steps} of {base}"]
        cells += [" / ".join(f"{speed((key, steps, base), model, n):.2f}x" for n in counts) for model in models]
        by = {(p.family, p.references): p for p in own}
        cells += [_loss(by.get(group)) for group in groups]
        code = "; ".join(f"`{line}`" for line in own[0].code.split("; "))
        lines.append(f"| {' | '.join(cells)} | {max(p.examples for p in own)} | {code} |")
    return "\n".join(lines)


def _loss(point: Point | None) -> str:
    if point is None:
        return ""
    parts = []
    if point.loss_db is not None:
        bounds = "" if point.low is None or point.low != point.low else f" [{point.low:+.1f}, {point.high:+.1f}]"
        parts.append(f"{point.loss_db:+.1f}{bounds}")
    return "; ".join([*parts, *([] if point.dense_db is None else [f"{point.dense_db:.1f}"])])

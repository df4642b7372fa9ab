"""The presets in one table: work at published sizes, and what they lose on the small model."""

from __future__ import annotations

from sparse_ref_attn.candidates import CANDIDATES, DENSE
from sparse_ref_attn.eval.settings import Setting
from sparse_ref_attn.frontier import Loss, loss_of, read_points
from sparse_ref_attn.presets import CHOSEN
from sparse_ref_attn.vocabulary import DEFAULT_PRESET

__all__ = ["presets"]

SIZES = (("kontext", 1), ("flux2-dev", 4))
STEPS = 28
FULL = {"faithful": "in four steps", "balanced": "in two steps", "fast": "once"}
HALF = 2


def presets() -> str:
    """Markdown: FLOP ratios from `estimate` in `STEPS` steps, losses of the worst kind of edit from the frontier."""
    lines = [
        "| preset | references are computed | FLUX.1 Kontext, 1 reference | FLUX.2 dev, 4 references "
        "| subject, dB | picture to the dense one, dB | open scenery's contrast, dB |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, choice in CHOSEN.items():
        ratios = [_ratio(choice.key, *size) for size in SIZES]
        default = " (default)" if name == DEFAULT_PRESET else ""
        lines.append(_line(f'`"{name}"`{default}', FULL[name], ratios, loss_of(read_points(), choice.key, STEPS)))
    fewer = loss_of(read_points(), DENSE, STEPS, STEPS // HALF)
    lines.append(_line("half the steps, no library", "in every step", [float(HALF)] * len(SIZES), fewer))
    return "\n".join(lines)


def _ratio(key: str, model: str, references: int) -> float:
    return Setting(config=CANDIDATES[key]).flop_ratio(STEPS, model, references)


def _line(name: str, computed: str, ratios: list[float], loss: Loss | None) -> str:
    if loss is None:
        raise ValueError(f"the frontier must have rows of {name}, got none")
    work = " | ".join(f"{ratio:.2f}x" for ratio in ratios)
    lost, picture = f"{loss.db:+.1f} [{loss.low:+.1f}, {loss.high:+.1f}]", f"{loss.dense_db or 0:.1f}"
    contrast = "" if loss.open_db is None else f"{loss.open_db:+.1f}"
    return f"| {name} | {computed} | {work} | {lost} | {picture} | {contrast} |"

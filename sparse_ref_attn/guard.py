"""A guard against dropping where attention is spread evenly."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import is_number
from .errors import ConfigError

__all__ = ["UniformGuard"]


@dataclass(frozen=True)
class UniformGuard:
    """Keeps more where the profiled attention is spread evenly: such edits need every token.

    A global recolour looks at the whole reference, and its mass is near uniform; a subject is
    looked at in one place. When the top quarter of the tokens holds less than `top_quarter` of
    the mass, every budget is raised to the tokens that hold `mass` of it, and to all tokens when
    that is more than `dense_above` of them.

    Parameters
    ----------
    top_quarter : float, in [0.25, 1]
        Share of the mass in the top 25 % tokens below which the mass counts as near uniform.
        0.25 is exactly uniform; the default lies between what a first small model showed for
        global recolours (0.29) and for placed subjects (0.62). It depends on the blocks that the
        selector measures: see Notes.
    mass : float, in (0, 1]
        Share of the mass to keep then.
    dense_above : float, in (0, 1]
        Share of the tokens above which dropping is given up.

    Notes
    -----
    In a dense-trained model of ``sparse_ref_attn.toy`` (14 held-out subjects a task, first step) the share over all
    blocks was 0.29-0.32 for global recolours and 0.37-0.49 for placed subjects. Over the single-stream blocks, which
    ReCAST measures, the two overlapped, 0.40-0.50 and 0.48-0.59, and the default hardly fired;
    ``ReCAST(select=AttentionMass(blocks="all"), guard=UniformGuard(0.345))`` did. Try it on your own model.

    Where references are stored and all of them are read there is nothing to keep more of, so the presets "faithful",
    "balanced" and "fast" have no guard: global recolours, for which it is made, lose 0.2 dB of the subject with
    "balanced" and 1.4 with "fast" (study `reading`, 52 edits). With a budget below 1.0 it does in a cache what it does
    without.
    """

    top_quarter: float = 0.40
    mass: float = 0.9
    dense_above: float = 0.75

    def __post_init__(self) -> None:
        for name, low in (("top_quarter", 0.25), ("mass", 0.0), ("dense_above", 0.0)):
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= 1 or value == 0:
                raise ConfigError(f"guard {name} must lie in [{low}, 1] and not be 0, got {value!r}")

"""Cosine similarity between the tokens of a reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from ..checks import is_one_of
from ..errors import ConfigError
from .base import References, Selector

__all__ = ["Cosine"]


@dataclass(frozen=True)
class Cosine(Selector):
    r"""Score a token by its mean cosine to the other tokens of the same reference.

    .. math:: c_r = \frac{1}{R_i - 1} \sum_{s \ne r} \frac{x_r \cdot x_s}{\lVert x_r \rVert \lVert x_s \rVert}

    x are the packed latents that enter the transformer, R_i the tokens of the reference; the mean over the
    batch is taken of c. score = -c for "distinct", c for "similar". Papers that compare with "cosine
    similarity" do not define it, and the two signs keep opposite tokens: say which one was used.

    Parameters
    ----------
    sign : {"distinct", "similar"}
        "distinct" keeps the tokens least like the rest, "similar" the most typical ones.

    Raises
    ------
    ConfigError
        If `sign` is neither.

    Notes
    -----
    O(R D): the sum of cosines is a product with the sum of the unit vectors. A zero vector has cosine 0 to
    every other; the only token of a reference has score 0.

    Examples
    --------
    >>> import torch
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=3, text=0, generation=(0, 0), references=(Reference(0, 3, (1, 3)),))
    >>> tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    >>> Cosine("similar").score(References(layout, tokens))[0]
    tensor([0.5000, 0.5000, 0.0000])
    """

    sign: str = "distinct"

    def __post_init__(self) -> None:
        if not is_one_of(self.sign, ("distinct", "similar")):
            raise ConfigError(f"sign must be 'distinct' or 'similar', got {self.sign!r}")

    def score(self, references: References) -> list[Tensor]:
        scores = []
        for rows in references.split(references.tokens):
            unit = functional.normalize(rows.float(), dim=-1)
            total = (unit * unit.sum(1, keepdim=True)).sum(-1) - unit.square().sum(-1)
            mean = total.mean(0) / max(rows.shape[1] - 1, 1)
            scores.append(mean if self.sign == "similar" else -mean)
        return scores

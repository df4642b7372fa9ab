"""A selector that was trained: it looks at the reference's tokens alone and predicts the attention that they get."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from .base import References, Selector
from .head import Head

__all__ = ["SHIPPED", "Learned"]

SHIPPED = Path(__file__).parent.parent / "assets" / "toy" / "selector.safetensors"
"""The head of the small model that ships in the package."""


@dataclass(frozen=True)
class Learned(Selector):
    r"""Score a token by the share of the attention that a trained head predicts for it, before the first step.

    .. math:: s(k) = \operatorname{softmax}_k h(x, y)_k \approx \frac{m(k)}{\sum_{k'} m(k')}

    h is a small convolutional network over each reference's grid of tokens x, told the mean y of the prompt's rows; m
    is the attention mass that `AttentionMass` measures. The softmax runs over the tokens of all references, so that
    these compete as they do under a measured mass; the mean over the batch is taken of s. No step measures anything, so
    any budget and any execution goes with it.

    Parameters
    ----------
    path : str, optional
        What ``sra train --selector`` wrote. Default: the head that ships for the small model, which fits no other.

    Raises
    ------
    ConfigError
        When the pipeline is patched, if there is no such file, it is no such head, or it was trained for another model.
    LayoutError
        At scoring, if the tokens or the prompt have another number of channels than those that it was trained on.
    PixelsUnavailableError
        At scoring, if a reference is no full grid of tokens.

    Notes
    -----
    It travels to JSON as its path. No host sync.

    References
    ----------
    Distilled from ReCAST's eq. (2)-(3); a learned selector is future work of Sparse Context.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=16, text=0, generation=(0, 0), references=(Reference(0, 16, (4, 4)),))
    >>> scores = Learned().score(References(layout, torch.zeros(1, 16, 64), prompt=torch.ones(1, 96)))[0]
    >>> scores.shape, round(scores.sum().item(), 4)
    (torch.Size([16]), 1.0)
    """

    path: str | None = None

    def __post_init__(self) -> None:
        if self.path is not None and not isinstance(self.path, str):
            raise ConfigError(f"path must be that of a file, or None, got {self.path!r}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Learned:
        """The selector of a file that ``sra train --selector`` wrote.

        Raises
        ------
        ConfigError
            If there is no such file, or it is no such head.
        """
        found = cls(os.fspath(path))
        found.head()
        return found

    def head(self, device: torch.device | str = "cpu") -> Head:
        """The trained network, with what it was distilled from (`head().origin`); a file that changed is read anew."""
        path = SHIPPED if self.path is None else Path(self.path)
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        return _read(path, stamp, str(device))

    def check(self, model: str) -> None:
        trained = self.head().origin.model
        if trained != model:
            which = "the learned selector that ships" if self.path is None else f"the learned selector in {self.path}"
            raise ConfigError(
                f"{which} must be used with the model that it was trained for, {trained}, got {model}: train one "
                "(sra train --selector)"
            )

    def score(self, references: References) -> list[Tensor]:
        tokens = references.tokens
        head = self.head(tokens.device)
        if tokens.shape[-1] != head.width:
            raise LayoutError(
                f"a learned selector must see tokens of as many channels as it was trained on, {head.width}, got "
                f"{tokens.shape[-1]}"
            )
        item, prompt = references.layout.conditional or slice(None), references.prompt if head.text else None
        if head.text and (prompt is None or prompt.shape[-1] != head.text):
            got = "none" if prompt is None else prompt.shape[-1]
            raise LayoutError(
                f"a learned selector must be told a prompt of {head.text} channels, as it was trained on, got {got}"
            )
        grids = [references.grid(i) for i in range(len(references.sizes))]
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            return references.split(head.shares(references.split(tokens[item]), grids, prompt).exp().mean(0))


@lru_cache(maxsize=8)
def _read(path: Path, stamp: int, device: str) -> Head:
    return Head.load(path, device)

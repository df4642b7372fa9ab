"""Rankings kept on disk: save, load, compare, use again for another prompt."""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..files import replacing
from .base import References, Selector
from .ranking import fingerprint
from .stability import spearman

__all__ = ["Ranking", "SavedRanking"]

FORMAT = "sparse_ref_attn ranking 1"

# What zipfile, numpy and json raise for no archive, one cut short or broken, a pickle, a missing member.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,  # also NotImplementedError: a flipped bit that asks for encryption or another compression
)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores of one run's references, with what they were measured on.

    Parameters
    ----------
    scores : sequence of Tensor, shapes (R_i,)
        Of each reference's tokens; kept as float32 on the CPU.
    grids : sequence of ((int, int) or None)
        Height and width in tokens of each reference.
    model : str
        Class name of the transformer.
    fingerprint : str
        `fingerprint` of the reference tokens.

    Raises
    ------
    LayoutError
        If a reference has no scores, or its grid and scores differ in size.

    Examples
    --------
    >>> a = Ranking([torch.tensor([0.1, 0.4, 0.3, 0.2])], [(2, 2)], "FluxTransformer2DModel", "ab12")
    >>> b = Ranking([torch.tensor([1.0, 3.0, 4.0, 2.0])], [(2, 2)], "FluxTransformer2DModel", "ab12")
    >>> a.sizes, [round(r, 6) for r in a.spearman(b)]
    ((4,), [0.8])
    """

    scores: Sequence[Tensor]
    grids: Sequence[tuple[int, int] | None]
    model: str
    fingerprint: str

    def __post_init__(self) -> None:
        scores = tuple(s.detach().to("cpu", torch.float32, copy=True) for s in self.scores)
        grids = tuple(None if grid is None else (int(grid[0]), int(grid[1])) for grid in self.grids)
        if not scores or len(scores) != len(grids):
            raise LayoutError(
                f"a ranking must have a grid for each reference's scores, got {len(grids)}, {len(scores)}"
            )
        for i, (score, grid) in enumerate(zip(scores, grids, strict=True)):
            if score.ndim != 1 or not len(score) or (grid is not None and grid[0] * grid[1] != len(score)):
                raise LayoutError(
                    f"reference {i} must have a score a token of its grid {grid}, got {tuple(score.shape)}"
                )
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "grids", grids)

    def __repr__(self) -> str:
        grids = ", ".join(
            f"{size} tokens" if grid is None else f"{grid[0]} x {grid[1]}"
            for size, grid in zip(self.sizes, self.grids, strict=True)
        )
        return f"Ranking({self.model}: {grids})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each reference."""
        return tuple(len(score) for score in self.scores)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz file; the file at `path` is replaced at once or, on failure, left as it was.

        Raises
        ------
        ConfigError
            If it cannot be written, on a full disk for example.
        """
        about = {"format": FORMAT, "grids": self.grids, "model": self.model, "fingerprint": self.fingerprint}
        arrays = {f"scores_{i}": score.numpy() for i, score in enumerate(self.scores)}
        with replacing(path) as draft, open(draft, "wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ranking:
        """Read what `save` wrote.

        Raises
        ------
        ConfigError
            If there is no such file, or it is not a whole ranking file.
        """
        if not Path(path).is_file():
            raise ConfigError(f"a saved ranking must be a file, got {os.fspath(path)!r}, which is none")
        try:
            with np.load(path, allow_pickle=False) as data:
                about = json.loads(data["about"].item())
                if about["format"] != FORMAT:
                    raise ValueError(f"format {about['format']!r}")
                scores = [torch.from_numpy(data[f"scores_{i}"]) for i in range(len(about["grids"]))]
                return cls(scores, about["grids"], about["model"], about["fingerprint"])
        except _UNREADABLE as e:
            raise ConfigError(
                f"{os.fspath(path)!r} must be a file written by Ranking.save ({FORMAT!r}), got {type(e).__name__}: {e}"
            ) from e

    def spearman(self, other: Ranking) -> list[float]:
        """Spearman's rank correlation with another ranking of the same references, one a reference.

        In [-1, 1]; equal scores share their mean rank. NaN where either ranks all tokens alike.

        Raises
        ------
        LayoutError
            If the references' sizes differ.
        """
        return spearman(self.scores, other.scores)


@dataclass(frozen=True)
class SavedRanking(Selector):
    """Scores from an earlier run, in place of a new profiling step.

    Parameters
    ----------
    ranking : Ranking
        From `Ranking.load` or an earlier run.
    require_same_reference : bool
        Refuse references whose tokens are not exactly those that were ranked. Switch it off for the same
        image on another device or dtype, whose latents differ in the last bits.

    Raises
    ------
    ConfigError
        If a field has another type.
    LayoutError
        At scoring, if sizes, grids or (when required) fingerprints differ.

    Notes
    -----
    It does not travel to JSON: save the ranking and name its file. The fingerprint costs one host sync.

    Examples
    --------
    >>> from sparse_ref_attn.types import Reference, TokenLayout
    >>> layout = TokenLayout(rows=2, text=0, generation=(0, 0), references=(Reference(0, 2, (1, 2)),))
    >>> refs = References(layout, torch.ones(1, 2, 8))
    >>> kept = Ranking([torch.tensor([0.2, 0.8])], [(1, 2)], "Flux", fingerprint(refs.tokens))
    >>> SavedRanking(kept).score(refs)
    [tensor([0.2000, 0.8000])]
    """

    ranking: Ranking
    require_same_reference: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.ranking, Ranking):
            raise ConfigError(f"ranking must be a Ranking (see Ranking.load), got {self.ranking!r}")
        if not isinstance(self.require_same_reference, bool):
            raise ConfigError(f"require_same_reference must be True or False, got {self.require_same_reference!r}")

    def score(self, references: References) -> list[Tensor]:
        grids = tuple(reference.grid for reference in references.layout.references)
        if (self.ranking.sizes, self.ranking.grids) != (references.sizes, grids):
            raise LayoutError(
                f"a saved ranking must fit the references, of {references.sizes} tokens in grids {grids}, "
                f"got one for {self.ranking.sizes} tokens in grids {self.ranking.grids}"
            )
        if self.require_same_reference and (got := fingerprint(references.tokens)) != self.ranking.fingerprint:
            raise LayoutError(
                f"the references must be those that were ranked, of fingerprint {self.ranking.fingerprint[:12]}, "
                f"got {got[:12]}; say require_same_reference=False to use the ranking anyway"
            )
        return [score.to(references.tokens.device, copy=True) for score in self.ranking.scores]

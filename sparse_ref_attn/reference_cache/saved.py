"""Reference K/V kept after a run, on disk or in memory, to be used instead of computing them again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..files import replacing
from ..selection import Ranking
from ..types import RefSelection

__all__ = ["ReferenceCache", "Source"]

FORMAT = "sparse_ref_attn reference cache 1"


@dataclass(frozen=True)
class Source:
    """What reference K/V were computed of; K/V serve only a run for which all of it is the same.

    Parameters
    ----------
    model : str
        The model family and the transformer's class.
    weights : str
        Fingerprint of the transformer's weights.
    conditions : str
        Arguments of the call that change the K/V beside the references, in words.
    references : str
        `selection.fingerprint` of the reference tokens.
    sizes : tuple of int
        Tokens of each reference.
    grids : tuple of ((int, int) or None)
        Height and width in tokens of each reference.
    """

    model: str
    weights: str
    conditions: str
    references: str
    sizes: tuple[int, ...]
    grids: tuple[tuple[int, int] | None, ...]

    def check(self, wanted: Source) -> None:
        """Raise LayoutError where `wanted`, of the run at hand, differs."""
        for name, what in (
            ("model", "model"), ("sizes", "references' sizes"), ("grids", "references' grids"),
            ("references", "references' content"), ("weights", "model's weights"), ("conditions", "call"),
        ):  # fmt: skip
            need, got = getattr(wanted, name), getattr(self, name)
            if need != got:
                raise LayoutError(
                    f"a reused reference cache must be of the same {what}, {_short(need)}, got one of {_short(got)}: "
                    "its keys and values would give a wrong image"
                )


@dataclass(frozen=True, eq=False)
class ReferenceCache:
    """Keys and values of reference tokens in every attention layer, with what they were computed of.

    Parameters
    ----------
    layers : sequence of (Tensor, Tensor)
        k and v of each layer in order of execution, after QK-norm and RoPE, shape (B, K, H, C); B is 1
        where all items of the batch had the same references.
    tokens : Tensor, shape (K,), int64
        Which reference token each row is, counted through all references, ascending.
    source : Source
    ranking : Ranking, optional
        The ranking whose best tokens these are; needed where not every token is held. A run that uses
        the cache then goes by it, whatever its selector.
    chosen_by : str
        The configuration that made the ranking, in words.

    Raises
    ------
    LayoutError
        If the parts do not fit each other.

    Examples
    --------
    >>> source = Source("Klein", "ab12", "", "cd34", (2,), ((1, 2),))
    >>> k = torch.zeros(1, 2, 4, 16)
    >>> cache = ReferenceCache([(k, k)], torch.arange(2), source)
    >>> cache.complete, cache.nbytes
    (True, 1024)
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    tokens: Tensor
    source: Source
    ranking: Ranking | None = None
    chosen_by: str = ""

    def __post_init__(self) -> None:
        total, held = sum(self.source.sizes), len(self.tokens)
        shapes = {(x.shape, x.dtype, x.device) for pair in self.layers for x in pair}
        if len(shapes) != 1 or self.layers[0][0].ndim != 4 or self.layers[0][0].shape[1] != held:
            raise LayoutError(
                f"every layer must hold k and v (B, {held}, H, C) of one shape, dtype and device, got {len(shapes)} "
                f"kinds: {sorted(str(tuple(shape)) for shape, _, _ in shapes)}"
            )
        if held > total or (held < total and self.ranking is None):
            raise LayoutError(f"a cache of {held} of {total} reference tokens must say whose ranking chose them")

    def counts(self) -> tuple[int, ...]:
        """Tokens held of each reference (syncs)."""
        return RefSelection(self.tokens, self.source.sizes).counts()

    @property
    def complete(self) -> bool:
        """Whether every reference token is held, so that any ranking can be used."""
        return len(self.tokens) == sum(self.source.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(x.numel() * x.element_size() for pair in self.layers for x in pair)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0][0].dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device

    def to(self, device: torch.device | str) -> ReferenceCache:
        """The same on another device; the dtype stays, since rounding would change the image."""
        layers = [(k.to(device), v.to(device)) for k, v in self.layers]
        return replace(self, layers=layers, tokens=self.tokens.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; the file at `path` is replaced at once or, on failure, left as it was.

        Raises
        ------
        ConfigError
            If it cannot be written, on a full disk for example.
        """
        from safetensors.torch import save_file

        tensors = {f"{name}_{i}": x for i, pair in enumerate(self.layers) for name, x in zip("kv", pair, strict=True)}
        tensors["tokens"] = self.tokens
        about: dict[str, Any] = {"source": vars(self.source), "ranked": None, "chosen_by": self.chosen_by}
        if self.ranking is not None:
            about["ranked"] = {"model": self.ranking.model, "fingerprint": self.ranking.fingerprint}
            tensors |= {f"scores_{i}": score for i, score in enumerate(self.ranking.scores)}
        tensors = _apart({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
        with replacing(path) as draft:
            save_file(tensors, draft, {"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ReferenceCache:
        """Read what `save` wrote, onto `device`.

        Raises
        ------
        ConfigError
            If there is no such file, or it is not a whole cache file.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ConfigError(f"a saved reference cache must be a file, got {os.fspath(path)!r}, which is none")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"format {header.get('format')!r}")
                about = json.loads(header["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
            source = about["source"]
            grids = tuple(None if grid is None else (grid[0], grid[1]) for grid in source["grids"])
            source = Source(**source | {"sizes": tuple(source["sizes"]), "grids": grids})
            ranking = None
            if about["ranked"] is not None:
                scores = [tensors[f"scores_{i}"] for i in range(len(grids))]
                ranking = Ranking(scores, grids, **about["ranked"])
            count = sum(name.startswith("k_") for name in tensors)
            layers = [(tensors[f"k_{i}"], tensors[f"v_{i}"]) for i in range(count)]
            return cls(layers, tensors["tokens"], source, ranking, about["chosen_by"])
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{os.fspath(path)!r} must be a file written by ReferenceCache.save ({FORMAT!r}), got "
                f"{type(error).__name__}: {error}"
            ) from error


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, none in the memory of another: safetensors refuses those."""
    found: dict[int, str] = {}
    for name, x in tensors.items():
        if found.setdefault(x.untyped_storage().data_ptr(), name) != name:
            tensors[name] = x.clone()
    return tensors


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."

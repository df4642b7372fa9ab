"""The head of a learned selector: from a reference's tokens to the share of the attention that each will get."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import is_int
from ..errors import ConfigError, VersionError
from ..extras import absent_module
from ..files import replacing

__all__ = ["Head", "Origin"]

KEY, FORMAT = "sparse_ref_attn", "selector 1"
DILATIONS = (1, 2, 4, 1)
"""Of the blocks' convolutions: a token sees eight to each side, and through the means the whole reference."""


@dataclass(frozen=True)
class Origin:
    """What a head was distilled from.

    Parameters
    ----------
    model : str
        The transformer's class and its blocks, as `Selector.check` is given them.
    weights : str
        Fingerprint of its weights. Not checked when the head is used: a fine-tuning or a LoRA changes it.
    trained : mapping
        How it was trained, JSON types.
    """

    model: str
    weights: str = ""
    trained: Mapping[str, Any] = field(default_factory=dict)


class Head(nn.Module):
    """A small convolutional network over the grid of one reference.

    Each block looks at a token's neighbourhood and at the mean of the whole reference, so that it fits any grid.

    Parameters
    ----------
    width : int
        D, channels of a token as the transformer gets it.
    origin : Origin
    text : int
        E, channels of the prompt as one vector; 0 for a head that does not look at it.
    channels : int
        Inside the head.

    Raises
    ------
    ConfigError
        If a size is out of range.

    Examples
    --------
    >>> head = Head(8, Origin("Flux"), text=6, channels=4)
    >>> head(torch.zeros(2, 15, 8), (3, 5), torch.ones(2, 6)).shape
    torch.Size([2, 15])
    """

    def __init__(self, width: int, origin: Origin, *, text: int = 0, channels: int = 32) -> None:
        super().__init__()
        for name, size, least in (("width", width, 1), ("text", text, 0), ("channels", channels, 1)):
            if not is_int(size, least):
                raise ConfigError(f"{name} of a head must be an int of at least {least}, got {size!r}")
        self.width, self.origin, self.text, self.channels = width, origin, text, channels
        self.asked = nn.Linear(text, channels) if text else None
        self.inside = nn.Conv2d(width, channels, 1)
        self.blocks = nn.ModuleList(_Block(channels, dilation) for dilation in DILATIONS)
        self.norm = nn.GroupNorm(1, channels)
        self.out = nn.Conv2d(channels, 1, 1)

    def forward(self, tokens: Tensor, grid: tuple[int, int], prompt: Tensor | None = None) -> Tensor:
        """Logits (B, R), float32, of one reference's tokens (B, R, D) on a grid of height x width = R, asked of by a
        prompt (B, E)."""
        x = self.inside(tokens.float().mT.unflatten(2, grid))
        if self.asked is not None and prompt is not None:
            x = x + self.asked(functional.layer_norm(prompt, (self.text,)))[:, :, None, None]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x)).flatten(1)

    def shares(self, rows: Sequence[Tensor], grids: Sequence[tuple[int, int]], prompt: Tensor | None = None) -> Tensor:
        """Log of the share of the references' attention that each of their tokens gets, (B, R); each item sums to 1.

        Parameters
        ----------
        rows : sequence of Tensor, shapes (B, R_i, D)
        grids : sequence of (int, int)
        prompt : Tensor, shape (B, E), optional
        """
        logits = [self(x, grid, prompt) for x, grid in zip(rows, grids, strict=True)]
        return torch.cat(logits, dim=-1).log_softmax(dim=-1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; the file at `path` is replaced at once or, on failure, left as it was.

        Raises
        ------
        ConfigError
            If it cannot be written, on a full disk for example.
        """
        from safetensors.torch import save_file

        about = {
            "format": FORMAT,
            "width": self.width,
            "text": self.text,
            "channels": self.channels,
            "origin": asdict(self.origin),
        }
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        with replacing(path) as draft:
            save_file(tensors, draft, {KEY: json.dumps(about)})  # one key: their order in a file is not fixed

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Head:
        """Read what `save` wrote, frozen, onto `device`.

        Raises
        ------
        ConfigError
            If there is no such file, or it is no whole head.
        VersionError
            If safetensors is not installed.
        """
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise VersionError(absent_module("safetensors")) from error

        if not Path(path).is_file():
            raise ConfigError(f"a learned selector must be a file, got {os.fspath(path)!r}, which is none")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                about = json.loads((file.metadata() or {}).get(KEY, "{}"))
                if about.get("format") != FORMAT:
                    raise ValueError(f"format {about.get('format')!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
            with torch.device("meta"):
                head = cls(about["width"], Origin(**about["origin"]), text=about["text"], channels=about["channels"])
            head.load_state_dict(tensors, assign=True)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError, ConfigError) as error:
            raise ConfigError(
                f"{os.fspath(path)!r} must be a file that sra train --selector writes ({FORMAT!r}), got "
                f"{type(error).__name__}: {error}"
            ) from error
        return head.eval().requires_grad_(False)


class _Block(nn.Module):
    """Adds to each token what its neighbours and the mean of all tell of it."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.up = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.down = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.norm(self.near(x))
        whole = near.mean((-2, -1), keepdim=True).expand_as(near)
        added: Tensor = self.down(functional.gelu(self.up(torch.cat([near, whole], dim=1))))
        return x + added

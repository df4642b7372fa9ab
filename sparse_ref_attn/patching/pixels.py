"""The pixels that a pipeline encodes: the VAE's own `encode`, listened to.

`encode` fires no module hook and the encoder inside sees slices and tiles, so the instance's
`encode` is wrapped and put back.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PixelsUnavailableError
from ..types import TokenLayout

__all__ = ["PixelTap", "encoder"]

_OWN: ContextVar[bool] = ContextVar("sparse_ref_attn_encodes", default=False)
"""Whether the library itself encodes: no tap of any patch hears it, also where a VAE is shared."""

_HEARD, _HEARD_BYTES = 512, 2**30
"""Encoded images that a tap remembers at most, and bytes of them, where no run takes them."""

_SURE = 0.998
"""Share of the tokens' variance that their own encoding explains at least: three roundings in bfloat16 cost 1e-4 of it,
more where a channel's mean is large; a photo that was retouched in a twentieth of its area costs some percent."""


@dataclass(frozen=True)
class _Heard:
    """What one ``encode`` was given (b, 3, H, W) and returned, in which pipeline call and thread."""

    pixels: Tensor
    encoded: Any
    call: int | None
    thread: int


class _Encode:
    """Stands in for ``vae.encode``; in a copy or a pickle of the VAE it is what it stood in for."""

    def __init__(self, vae: nn.Module, seen: deque[_Heard]) -> None:
        self.vae = weakref.ref(vae)
        self.earlier = vars(vae).get("encode")
        self.seen: deque[_Heard] | None = seen

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        vae: Any = self.vae()
        out = self.earlier(x, *args, **kwargs) if self.earlier else type(vae).encode(vae, x, *args, **kwargs)
        if self.seen is not None and not _OWN.get():
            self.seen.append(_Heard(x.detach(), out, _pipeline_call(vae), threading.get_ident()))
            while len(self.seen) > _HEARD or (
                len(self.seen) > 1 and sum(_bytes(heard.pixels) for heard in self.seen) > _HEARD_BYTES
            ):
                self.seen.popleft()
        return out

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A copy is asked for its method before it has a state of its own: that is the class's.
        return (getattr, (self.vae(), "encode")) if self.earlier is None else (_same, (self.earlier,))


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _same(call: Callable[..., Any]) -> Callable[..., Any]:
    return call


class PixelTap:
    """Listens to a VAE and matches what it encoded to the references of a run."""

    def __init__(self, vae: nn.Module) -> None:
        self._seen: deque[_Heard] = deque()
        self._encode = _Encode(vae, self._seen)
        self._handed_over = False
        vae.encode = self._encode  # type: ignore[assignment]

    def take(self, layout: TokenLayout, tokens: Tensor) -> list[Tensor | None]:
        """Pixels (b, 3, H, W) of each reference, None where none are surely its own; forgets the rest.

        A reference's own are those whose encoding its tokens are: each channel of the tokens follows a
        channel of the latents over the whole grid. Only what the same pipeline call encoded is asked,
        so that a reference given as latents has no pixels, whatever the VAE encoded before. One host sync
        where anything was encoded.

        Parameters
        ----------
        layout : TokenLayout
        tokens : Tensor, shape (B, R, D)
            The reference rows.

        Notes
        -----
        Where the items of the batch have pictures of their own, b is the batch, whether they were
        encoded together or one by one.
        """
        pictures = self._pictures()
        out: list[Tensor | None] = [None] * len(layout.references)
        wanted, likeness = [], []
        for i, part in enumerate(tokens.split(layout.sizes, dim=1)):
            grid = layout.references[i].grid
            fits = [j for j, (pixels, _) in enumerate(pictures) if grid is not None and _fits(pixels, grid)]
            if grid is not None and fits:
                wanted.append((i, fits))
                likeness.append(_likeness(part, [pictures[j][1] for j in fits], grid))
        if not wanted:
            return out
        flat = iter(torch.cat([x.flatten() for x in likeness]).tolist())
        for (i, fits), alike in zip(wanted, likeness, strict=True):
            chosen = []
            for _ in range(alike.shape[0]):
                best = max(zip(islice(flat, len(fits)), fits, strict=True))
                chosen.append(best[1] if best[0] >= _SURE else None)
            out[i] = _batch([None if j is None else pictures[j][0] for j in _period(chosen)])
        return out

    def _pictures(self) -> list[tuple[Tensor, Tensor]]:
        """What this call encoded, one picture each: (1, 3, H, W) and latents (1, channels, h, w).

        What was heard in this thread is forgotten: earlier calls here are over.
        """
        vae = self._encode.vae()
        call = None if vae is None else _pipeline_call(vae)
        heard = list(self._seen)
        self._seen.clear()
        own = [x for x in heard if self._handed_over or x.call == call]
        self._seen.extend(x for x in heard if x.thread != threading.get_ident() and not any(x is y for y in own))
        pictures: list[tuple[Tensor, Tensor]] = []
        for x in own:
            latents = _latents(x.encoded)
            if latents is not None and len(latents) == len(x.pixels):
                pixels = _on_white(x.pixels) if x.pixels.shape[1] == 4 else x.pixels
                pictures += _frames(pixels, latents)
        return pictures

    def handed_over(self) -> PixelTap:
        """What was heard so far, as a tap of its own that hears no more; this one forgets it."""
        other = copy.copy(self)
        other._seen, other._handed_over = deque(self._seen), True
        self._seen.clear()
        return other

    def remove(self) -> None:
        """Put the VAE's own `encode` back; where somebody has wrapped ours since, it stays and only passes on."""
        self._encode.seen = None
        self._seen.clear()
        vae = self._encode.vae()
        if vae is None:
            return
        outer = vars(vae).get("encode")
        if outer is self._encode:
            _put_back(vae, self._encode.earlier)
        while isinstance(outer, _Encode):  # a patch of another pipeline that shares the VAE
            if outer.earlier is self._encode:
                outer.earlier = self._encode.earlier
            outer = outer.earlier


def _put_back(vae: nn.Module, earlier: Any) -> None:
    if earlier is None:
        del vae.encode
    else:
        vae.encode = earlier


def encoder(
    pipe: weakref.ref[Any], encode: Callable[[Any, Tensor], tuple[Tensor, tuple[int, int]]]
) -> Callable[[Tensor], tuple[Tensor, tuple[int, int]]]:
    """An adapter's `encode` of one pipeline as `References` offer it: without gradients, heard by no `PixelTap`."""

    def call(pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        living = pipe()
        if living is None:
            raise PixelsUnavailableError("the pipeline that was patched must still exist to encode images; it is gone")
        token = _OWN.set(True)
        try:
            with torch.no_grad():
                return encode(living, pixels)
        finally:
            _OWN.reset(token)

    return call


def _pipeline_call(vae: nn.Module) -> int | None:
    """Which call of a pipeline with this VAE the calling thread is in; None outside of one.

    A pipeline announces neither the start nor the end of its call, and encodes before anything that it can be heard by.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            if not isinstance(caller, _Encode) and getattr(caller, "vae", None) is vae:
                return id(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _frames(pixels: Tensor, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each frame of the latents (b, channels, [f], h, w) with the last frame of the pixels that it is made of."""
    pixels, latents = (x if x.ndim == 5 else x[:, :, None] for x in (pixels, latents))
    count = latents.shape[2]
    every = (pixels.shape[2] - 1) // max(1, count - 1)
    times = [(pixels[:, :, t * every].split(1), latents[:, :, t].split(1)) for t in range(count)]
    return [pair for each in times for pair in zip(*each, strict=True)]


def _on_white(pixels: Tensor) -> Tensor:
    """RGB (b, 3, H, W) of a picture with transparency (b, 4, H, W), all in [-1, 1]."""
    alpha = pixels[:, 3:] * 0.5 + 0.5
    return pixels[:, :3] * alpha + (1 - alpha)


def _fits(pixels: Tensor, grid: tuple[int, int]) -> bool:
    (height, width), (rows, columns) = pixels.shape[-2:], grid
    return height % rows == 0 and height // rows * columns == width


def _likeness(tokens: Tensor, latents: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """(B, K): the share of the variance of tokens (B, R, D) that each of K encodings (1, channels, h, w) explains.

    Tokens are patches of latents, each channel shifted and scaled by numbers that depend on the model. Two pictures
    that are the same everywhere have the same scores; of a single token nothing can be said, and it gets 0.
    """
    own = _normalised(tokens)
    nothing_told = float(tokens.shape[1] > 1)
    out = []
    for encoding in latents:
        patches = _patches(encoding.to(tokens.device), grid)
        if patches is None or patches.shape[2] != tokens.shape[2]:
            out.append(own.new_zeros(own.shape[0]))
            continue
        theirs = _normalised(patches)
        told = ((own != 0).any(1) | (theirs != 0).any(1)).sum(-1)
        explained = (own * theirs).sum(1).square().sum(-1) / told.clamp(min=1)
        out.append(torch.where(told == 0, nothing_told, explained))
    return torch.stack(out, dim=1)


def _normalised(x: Tensor) -> Tensor:
    """(b, R, D) with each channel of mean 0 and norm 1 over the rows; 0 where it is constant to rounding."""
    rounding = x.abs().amax(1, keepdim=True).float() * torch.finfo(x.dtype).eps
    x = x.float() - x.float().mean(1, keepdim=True)
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > rounding * x.shape[1] ** 0.5, x / norm, 0.0)


def _patches(latents: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """(b, channels, h, w) as rows of the grid, (b, rows * columns, channels * patch), channels outermost."""
    (batch, channels, height, width), (rows, columns) = latents.shape, grid
    if height % rows or width % columns:
        return None
    cells = latents.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def _period(chosen: list[int | None]) -> list[int | None]:
    """The shortest beginning that the list repeats: one picture for all items of a batch is said once."""
    for length in range(1, len(chosen) + 1):
        if len(chosen) % length == 0 and list(islice(cycle(chosen[:length]), len(chosen))) == chosen:
            return chosen[:length]
    return chosen


def _batch(pictures: list[Tensor | None]) -> Tensor | None:
    """One tensor of all items' pictures, None where one has none."""
    known = [x for x in pictures if x is not None]
    if not known or len(known) < len(pictures):
        return None
    return known[0] if len(known) == 1 else torch.cat(known)


def _latents(encoded: Any) -> Tensor | None:
    """The mode of a VAE's output, (b, channels, h, w) or (b, channels, 1, h, w)."""
    if isinstance(encoded, Sequence) and encoded:
        encoded = encoded[0]
    distribution = getattr(encoded, "latent_dist", encoded)
    if hasattr(distribution, "mode"):
        return distribution.mode()
    return getattr(encoded, "latents", None)

"""The pixels that a pipeline encodes: the VAE's own `encode`, listened to.

`encode` fires no module hook and the encoder inside sees slices and tiles, so the instance's
`encode` is wrapped and put back.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
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


class _Encode:
    """Stands in for ``vae.encode``; in a copy or a pickle of the VAE it is what it stood in for."""

    def __init__(self, vae: nn.Module, seen: deque[tuple[Tensor, Any]]) -> None:
        self.vae = weakref.ref(vae)
        self.earlier = vars(vae).get("encode")
        self.seen: deque[tuple[Tensor, Any]] | None = seen

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        vae: Any = self.vae()
        out = self.earlier(x, *args, **kwargs) if self.earlier else type(vae).encode(vae, x, *args, **kwargs)
        if self.seen is not None and not _OWN.get():
            self.seen.append((x.detach(), out))
            while len(self.seen) > _HEARD or (
                len(self.seen) > 1 and sum(_bytes(x) for x, _ in self.seen) > _HEARD_BYTES
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
        self._seen: deque[tuple[Tensor, Any]] = deque()
        self._encode = _Encode(vae, self._seen)
        vae.encode = self._encode  # type: ignore[assignment]

    def take(self, layout: TokenLayout, tokens: Tensor) -> list[Tensor | None]:
        """Pixels (b, 3, H, W) of each reference, None where it was given as latents; forgets the rest.

        Matched by grid, latest first, since inpainting encodes other images too; where more than
        enough have a reference's grid, the one whose latents its tokens follow; where fewer do,
        the images that were encoded together are taken apart. A batch that was encoded one by one
        (a generator a sample) is put together, each item's own picture.

        Parameters
        ----------
        layout : TokenLayout
        tokens : Tensor, shape (B, R, D)
            The reference rows.
        """
        seen = list(self._seen)
        self._seen.clear()
        out: list[Tensor | None] = [None] * len(layout.references)
        parts = tokens.split(layout.sizes, dim=1)
        for i in reversed(range(len(out))):
            fits = [j for j, (x, _) in enumerate(seen) if _fits(x, layout.references[i].grid)]
            if not fits:
                continue
            grid = layout.references[i].grid
            assert grid is not None
            alike = sum(r.grid == grid for r in layout.references[: i + 1])
            chosen = fits[-1:]
            if len(fits) > alike:
                chosen = [max(fits, key=lambda j: (_likeness(seen[j][1], item, grid), j)) for item in parts[i].split(1)]
                if len(set(chosen)) == 1 or any(seen[j][0].shape[0] > 1 for j in chosen):
                    chosen = chosen[:1]
            pixels, encoded = seen[chosen[0]]
            if len(chosen) > 1:
                pixels = torch.cat([seen[j][0] for j in chosen])
            seen = [pair for j, pair in enumerate(seen) if j not in chosen]
            if len(fits) < alike and pixels.shape[0] > 1:
                seen.insert(chosen[0], (pixels[:-1], encoded))
                pixels = pixels[-1:]
            out[i] = pixels[:, :, 0] if pixels.ndim == 5 else pixels
        return out

    def handed_over(self) -> PixelTap:
        """What was heard so far, as a tap of its own that hears no more; this one forgets it."""
        other = copy.copy(self)
        other._seen = deque(self._seen)
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


def _fits(pixels: Tensor, grid: tuple[int, int] | None) -> bool:
    if grid is None:
        return False
    (height, width), (rows, columns) = pixels.shape[-2:], grid
    return height % rows == 0 and height // rows * columns == width


def _likeness(encoded: Any, tokens: Tensor, grid: tuple[int, int]) -> float:
    """Correlation over the grid between an encoding and the tokens made of it (1 for the true one)."""
    latents = _latents(encoded)
    if latents is None or latents.shape[-2] % grid[0] or latents.shape[-1] % grid[1]:
        return -2.0
    cells = torch.nn.functional.adaptive_avg_pool2d(latents[:1].flatten(1, -3).float().mean(1, keepdim=True), grid)
    a, b = cells.flatten().double(), tokens[0].float().mean(-1).double().to(cells.device)
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1].abs().nan_to_num())


def _latents(encoded: Any) -> Tensor | None:
    """The mode of a VAE's output, (b, channels, h, w) or (b, channels, 1, h, w)."""
    if isinstance(encoded, Sequence) and encoded:
        encoded = encoded[0]
    distribution = getattr(encoded, "latent_dist", encoded)
    if hasattr(distribution, "mode"):
        return distribution.mode()
    return getattr(encoded, "latents", None)

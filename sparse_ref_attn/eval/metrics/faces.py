"""Whether two pictures show the same person: cosine of what a face network sees in their largest faces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ConfigError
from .base import as_image
from .face_finder import FaceFinder, Scrfd, YuNet
from .identity import Embedding
from .onnx import Onnx
from .weights import sface_file, yunet_file

__all__ = ["FACE", "FACE_FOUND", "AuraFaceSimilarity", "FaceSimilarity", "SFaceSimilarity", "aligned"]

FACE, FACE_FOUND = "face", "face found"
"""What the names of columns begin with."""

_SIDE = 112
_PLACES = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where ArcFace (Deng et al. 2019), and what is trained as it was, has eyes, nose and mouth in 112 x 112 pixels."""


class FaceSimilarity(Embedding):
    """Cosine of the embeddings of the largest face in each of two pictures, in [-1, 1].

    Attributes
    ----------
    found : str
        Column of whether there was a face. Where there is none, there is no similarity.
    """

    _find: FaceFinder
    _model: Onnx

    def __init__(self, model: str) -> None:
        self.name, self.found = f"{FACE} ({model})", f"{FACE_FOUND} ({model})"

    def embed(self, image: Any) -> Tensor | None:
        """One vector (D,) of the largest face; None where none is found."""
        picture = as_image(image)
        face = self._find(picture)
        if face is None:
            return None
        (seen,) = self._model(self._scaled(aligned(picture, face.landmarks) * 255)).values()
        return seen.flatten()

    def _scaled(self, crop: Tensor) -> Tensor:
        """From 0 to 255 to what the network is given."""
        raise NotImplementedError


class SFaceSimilarity(FaceSimilarity):
    """OpenCV's SFace, on faces that its YuNet finds: weights out of a Python package, nothing is downloaded.

    Raises
    ------
    ConfigError
        If the package with the weights is not installed, or has others.
    VersionError
        If onnxruntime is not installed.

    References
    ----------
    .. [1] Zhong et al., "SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition", 2022. Two pictures
       with a cosine of at least 0.363 show one person, its authors say.
    """

    def __init__(self) -> None:
        super().__init__("SFace")
        self._find, self._model = YuNet(Onnx(yunet_file())), Onnx(sface_file())

    def _scaled(self, crop: Tensor) -> Tensor:
        return crop  # the network scales by itself


class AuraFaceSimilarity(FaceSimilarity):
    """AuraFace, on faces that the SCRFD beside it finds, from a local folder.

    Parameters
    ----------
    path : str or Path
        A copy of fal/AuraFace-v1: ``glintr100.onnx`` and ``scrfd_10g_bnkps.onnx`` are read.

    Raises
    ------
    ConfigError
        If these are not there, or no networks.
    VersionError
        If onnxruntime is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__("AuraFace")
        finder, model = (Path(path) / name for name in ("scrfd_10g_bnkps.onnx", "glintr100.onnx"))
        for file in (finder, model):
            if not file.is_file():
                raise ConfigError(f"a folder of AuraFace must hold {finder.name} and {model.name}, got no {file}")
        self._find, self._model = Scrfd(Onnx(finder)), Onnx(model)

    def _scaled(self, crop: Tensor) -> Tensor:
        return (crop - 127.5) / 127.5


def aligned(picture: Tensor, landmarks: Tensor) -> Tensor:
    """A face turned, scaled and moved so that its landmarks come nearest to their places, (3, 112, 112).

    With points as complex numbers the best similarity ``w = a z + b`` is linear least squares in a and b.

    Parameters
    ----------
    picture : Tensor, shape (3, H, W)
        Beyond its edge it is black.
    landmarks : Tensor, shape (5, 2)
        As those of a `Face`; not all the same.

    Examples
    --------
    >>> picture = torch.rand(3, 112, 112)
    >>> torch.allclose(aligned(picture, torch.tensor(_PLACES)), picture, atol=1e-4)
    True
    """
    z, w = (torch.view_as_complex(points.double().contiguous()) for points in (landmarks, torch.tensor(_PLACES)))
    off = z - z.mean()
    a = (off.conj() * (w - w.mean())).sum() / off.abs().square().sum()
    x = torch.arange(_SIDE, dtype=torch.float64)
    at = (torch.complex(*torch.meshgrid(x, x, indexing="xy")) - w.mean()) / a + z.mean()
    height, width = picture.shape[1:]
    grid = torch.stack([2 * at.real / max(width - 1, 1) - 1, 2 * at.imag / max(height - 1, 1) - 1], -1)
    return functional.grid_sample(picture[None], grid[None].to(picture.dtype), align_corners=True)[0]

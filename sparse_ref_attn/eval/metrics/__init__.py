"""How alike two images are, each metric by the name of the model it uses.

`Psnr`, `Ssim`, `SceneryPsnr` and `SceneryContrast` need no weights; `Lpips`, `Dists`, `MobileNetIdentity` and
`SFaceSimilarity` read those that Python packages carry; `ClipSimilarity`, `DinoSimilarity` and `AuraFaceSimilarity`
those of a local folder. `frechet_distance` is of two sets.
"""

from .base import Metric, as_image
from .bootstrap import Interval, mean_interval
from .contrast import SceneryContrast
from .faces import AuraFaceSimilarity, FaceSimilarity, SFaceSimilarity
from .fidelity import MaskedPsnr, Psnr, Ssim
from .frechet import InceptionFeatures, frechet_distance
from .identity import ClipSimilarity, ClipText, DinoSimilarity, MobileNetIdentity
from .perceptual import Dists, Lpips
from .scenery import SceneryPsnr

__all__ = [
    "AuraFaceSimilarity",
    "ClipSimilarity",
    "ClipText",
    "DinoSimilarity",
    "Dists",
    "FaceSimilarity",
    "InceptionFeatures",
    "Interval",
    "Lpips",
    "MaskedPsnr",
    "Metric",
    "MobileNetIdentity",
    "Psnr",
    "SFaceSimilarity",
    "SceneryContrast",
    "SceneryPsnr",
    "Ssim",
    "as_image",
    "frechet_distance",
    "mean_interval",
]

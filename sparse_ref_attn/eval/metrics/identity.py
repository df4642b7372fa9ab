"""Whether two images show the same thing: cosine of what a network sees in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ConfigError
from .base import Metric, as_image
from .weights import mobilenet_weights

__all__ = ["ClipSimilarity", "ClipText", "DinoSimilarity", "Embedding", "MobileNetIdentity"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Embedding(Metric):
    """Cosine of two images' embeddings, in [-1, 1]. The images may differ in size.

    Attributes
    ----------
    found : str or None
        Column of whether an image shows what is embedded; None for what embeds any image.
    """

    higher_is_better = True
    found: str | None = None

    def embed(self, image: Any) -> Tensor | None:
        """One vector (D,); None for an image that does not show what is embedded."""
        raise NotImplementedError

    def likeness(self, a: Tensor, b: Tensor) -> float:
        """Of two embeddings."""
        return float(functional.cosine_similarity(a, b, dim=0))

    def __call__(self, image: Any, other: Any) -> float:
        a, b = self.embed(image), self.embed(other)
        if a is None or b is None:
            raise ConfigError(f"both images must show what {self.name} compares, got one that does not")
        return self.likeness(a, b)


class MobileNetIdentity(Embedding):
    """A proxy for identity, without any download at run time: MobileNetV2's pooled ImageNet features.

    On the crop of a subject it finds the right one among many; it is not DINO, and is not called so. Images are resized
    to 224 x 224.

    Raises
    ------
    ConfigError
        If the package with the weights is not installed.
    """

    name = "identity (MobileNetV2)"

    def __init__(self) -> None:
        from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

        state = mobilenet_weights()
        config = MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5)
        config.num_labels = 1000
        self._model = MobileNetV2ForImageClassification(config).eval()
        own = self._model.state_dict()
        # Both lay out the same network in the same order, under names of their own.
        self._model.load_state_dict(dict(zip(own, state.values(), strict=True)))

    @torch.no_grad()
    def embed(self, image: Any) -> Tensor:
        return self._model.mobilenet_v2(_pixels(image, 224, *_IMAGENET)).pooler_output.flatten()

    def logits(self, image: Any) -> Tensor:
        """Of the 1,000 ImageNet classes (1000,)."""
        with torch.no_grad():
            return self._model(_pixels(image, 224, *_IMAGENET)).logits[0]


class ClipSimilarity(Embedding):
    """CLIP-I: cosine of the projected image embeddings of a CLIP model in a local folder.

    Parameters
    ----------
    path : str or Path
        Folder in transformers' format; nothing is downloaded.
    """

    def __init__(self, path: str | Path) -> None:
        self._model, self._processor = _load(path, "CLIPModel")
        self.name = f"CLIP-I ({Path(path).name})"

    @torch.no_grad()
    def embed(self, image: Any) -> Tensor:
        given = self._processor(images=_pil(image), return_tensors="pt")
        return _vector(self._model.get_image_features(**given))


class ClipText(Metric):
    """CLIP-T: cosine of an image's and a prompt's embeddings, of a CLIP model in a local folder.

    Parameters
    ----------
    model : str, Path or ClipSimilarity
        The folder, or what has loaded it.
    """

    higher_is_better = True

    def __init__(self, model: str | Path | ClipSimilarity) -> None:
        loaded = model if isinstance(model, ClipSimilarity) else ClipSimilarity(model)
        self._model, self._processor = loaded._model, loaded._processor
        self.name = loaded.name.replace("CLIP-I", "CLIP-T", 1)

    @torch.no_grad()
    def __call__(self, image: Any, prompt: str) -> float:
        """`prompt` is what the image should show."""
        given = self._processor(images=_pil(image), text=prompt, return_tensors="pt", truncation=True, padding=True)
        seen = self._model.get_image_features(pixel_values=given["pixel_values"])
        told = self._model.get_text_features(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        return float(functional.cosine_similarity(_vector(seen), _vector(told), dim=0))


class DinoSimilarity(Embedding):
    """Cosine of the class tokens of a DINO or DINOv2 model in a local folder."""

    def __init__(self, path: str | Path) -> None:
        self._model, self._processor = _load(path, "AutoModel")
        self.name = f"DINO ({Path(path).name})"

    @torch.no_grad()
    def embed(self, image: Any) -> Tensor:
        given = self._processor(images=_pil(image), return_tensors="pt")
        return self._model(**given).last_hidden_state[0, 0]


def _vector(features: Any) -> Tensor:
    """Transformers returns a tensor or an output that pools one, by version."""
    return (features if isinstance(features, Tensor) else features.pooler_output)[0]


def _pixels(image: Any, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    x = functional.interpolate(as_image(image)[None], (side, side), mode="bicubic", antialias=True, align_corners=False)
    return (x.clamp(0, 1) - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def _pil(image: Any) -> Any:
    from PIL import Image

    return Image.fromarray((as_image(image).movedim(0, -1) * 255).round().byte().numpy())


def _load(path: str | Path, name: str) -> tuple[Any, Any]:
    import transformers

    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"the path of a model must be a folder with config.json, got {path}")
    model = getattr(transformers, name).from_pretrained(path, local_files_only=True).eval()
    kind = transformers.AutoImageProcessor if name == "AutoModel" else transformers.AutoProcessor
    return model, kind.from_pretrained(path, local_files_only=True)

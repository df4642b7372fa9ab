"""A network in ONNX, run on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError, VersionError

__all__ = ["Onnx"]


class Onnx:
    """A network with one input, from a file.

    Parameters
    ----------
    path : Path

    Raises
    ------
    VersionError
        If onnxruntime is not installed.
    ConfigError
        If the file holds no such network.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise VersionError("networks in ONNX need onnxruntime: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # each kind of broken file has a class of its own
            raise ConfigError(f"{path} must hold a network in ONNX, got: {str(error).splitlines()[0]}") from error
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs by name, in the network's order, of one image (C, H, W) float32."""
        (given,) = self._session.get_inputs()
        values = self._session.run(None, {given.name: image[None].contiguous().numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(self._names, values, strict=True)}

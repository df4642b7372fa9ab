"""Models of trainers and other codebases, by their full names: a family that serves one, or an adapter of its own.

Nothing of theirs is imported. SimpleTuner's models and musubi-tuner's Qwen-Image are built as those of diffusers, with
SimpleTuner's entries by token (see `adapters.row_arguments`); musubi-tuner's and ai-toolkit's other models as those of
Black Forest Labs; DiffSynth-Studio's FLUX.1 and Qwen-Image are run by functions (see `FunctionModel`).
"""

from __future__ import annotations

from collections.abc import Mapping

from ...adapters import Adapter
from .black_forest import FLUX, FLUX2
from .diffsynth import FLUX_FUNCTION, QWEN_FUNCTION

__all__ = ["CODEBASES"]

CODEBASES: Mapping[str, str | Adapter] = {
    "simpletuner.helpers.models.flux.transformer.FluxTransformer2DModel": "flux",
    "simpletuner.helpers.models.flux2.transformer.Flux2Transformer2DModel": "flux2",
    "simpletuner.helpers.models.qwen_image.transformer.QwenImageTransformer2DModel": "qwen",
    "musubi_tuner.flux.flux_models.Flux": FLUX,
    "musubi_tuner.flux_2.flux2_models.Flux2": FLUX2,
    "musubi_tuner.qwen_image.qwen_image_model.QwenImageTransformer2DModel": "qwen",
    "extensions_built_in.diffusion_models.flux2.src.model.Flux2": FLUX2,  # ai-toolkit
    "diffsynth.models.flux2_dit.Flux2DiT": "flux2",
    "diffsynth.pipelines.flux_image.model_fn_flux_image": FLUX_FUNCTION,
    "diffsynth.pipelines.qwen_image.model_fn_qwen_image": QWEN_FUNCTION,
}
"""Full name of a class, or of a function that runs a model -> a line of `vocabulary.FAMILIES`, or an adapter."""

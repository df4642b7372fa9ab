"""The nodes: one that makes a model read fewer reference tokens, and one that shows which."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_ref_attn.errors import SparseRefError
from sparse_ref_attn.eval.ways import WAYS
from sparse_ref_attn.overlay import overlay
from sparse_ref_attn.report import summary
from sparse_ref_attn.vocabulary import CHOSEN_PRESETS

from .rows import kinds_of
from .sampling import Sampling

__all__ = ["KEY", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "OFFERED", "SparseReferences", "TokensRead"]

KEY = "sparse_ref_attn"
OFFERED = tuple(way for way in WAYS if way not in (*CHOSEN_PRESETS, "downscaled", "ToMe", "cache", "tiles"))
"""The rules that choose among the reference's own tokens: in ComfyUI tokens are dropped, not changed and not stored."""
PHOTOS = ("reference_1", "reference_2", "reference_3")


class SparseReferences:
    """A clone of a model that reads a share of its reference tokens; the model that is given stays as it is."""

    CATEGORY = "advanced/model"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    DESCRIPTION = (
        "Makes FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit read only the reference tokens that matter. Bypass the node "
        "to undo it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, ...]]]:  # noqa: N802 -- ComfyUI's name
        photo = ("IMAGE", {"tooltip": "The photo of this reference latent; edges and saliency look at it."})
        return {
            "required": {
                "model": ("MODEL",),
                "rule": (list(OFFERED), {"default": OFFERED[0], "tooltip": "Which reference tokens are kept."}),
                "share": (
                    "FLOAT",
                    {
                        "default": 0.25, "min": 0.01, "max": 1.0, "step": 0.01, "round": 0.001,
                        "tooltip": "Mean share of the reference tokens over all steps, a dense first step included.",
                    },
                ),
                "rule_seed": ("INT", {"default": 0, "min": 0, "max": 2**53 - 1, "tooltip": "Of rules that draw."}),
            },
            "optional": dict.fromkeys(PHOTOS, photo),
        }  # fmt: skip

    def patch(self, model: Any, rule: str, share: float, rule_seed: int, **photos: Tensor) -> tuple[Any]:
        """The patched clone.

        Parameters
        ----------
        model : comfy.model_patcher.ModelPatcher
        rule, share, rule_seed
            As in `Sampling`.
        **photos : Tensor, shape (B, H, W, 3), 0 to 1
            By the names of `PHOTOS`; the first of each batch counts.

        Raises
        ------
        UnsupportedModelError
            If the model is of another family.
        """
        from comfy.patcher_extension import WrappersMP

        kinds_of(model.get_model_object("diffusion_model"))
        given = [photos[name] for name in PHOTOS if photos.get(name) is not None]
        pixels = [photo[:1, ..., :3].movedim(-1, 1) * 2 - 1 for photo in given]
        sampling = Sampling(rule, share, rule_seed, pixels)
        patched = model.clone()
        options = patched.model_options["transformer_options"]
        before = options.get(KEY)
        if before is not None:  # a node of ours further up: the last one counts
            kept = [patch for patch in options["patches"]["post_input"] if patch != before.post_input]
            options["patches"]["post_input"] = kept
        options[KEY] = sampling
        for kind, wrapper in (
            (WrappersMP.OUTER_SAMPLE, sampling.outer_sample),
            (WrappersMP.DIFFUSION_MODEL, sampling.diffusion_model),
        ):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        patched.set_model_patch(sampling.post_input, "post_input")
        return (patched,)


class TokensRead:
    """What the last sampling of a patched model read, as a picture and as words."""

    CATEGORY = "advanced/model"
    FUNCTION = "show"
    RETURN_TYPES = ("LATENT", "IMAGE", "STRING")
    RETURN_NAMES = ("latent", "tokens", "report")
    DESCRIPTION = "Which reference tokens the sampling before it read. Takes the latent so that it runs after it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, ...]]]:  # noqa: N802 -- ComfyUI's name
        model = ("MODEL", {"tooltip": "From Sparse References, as the sampler has it."})
        return {"required": {"model": model, "latent": ("LATENT", {"tooltip": "What that sampler made."})}}

    def show(self, model: Any, latent: Any) -> tuple[Any, Tensor, str]:
        """The latent as it is, the overlay (1, H, W, 3) in 0 to 1, and the report.

        Raises
        ------
        SparseRefError
            If the model is not patched, or has sampled nothing with references.
        """
        sampling = model.model_options["transformer_options"].get(KEY)
        if sampling is None:
            raise SparseRefError("the model must come from Sparse References, got one that is not patched")
        if sampling.record is None or not sampling.record.steps:
            raise SparseRefError("a sampling with reference latents must have taken place, got none on this model")
        picture = np.asarray(overlay(sampling.record).convert("RGB"), dtype=np.float32) / 255
        return latent, torch.from_numpy(picture)[None], summary(sampling.record, "text")


NODE_CLASS_MAPPINGS = {"SparseReferences": SparseReferences, "SparseReferencesTokensRead": TokensRead}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SparseReferences": "Sparse References",
    "SparseReferencesTokensRead": "Sparse References: tokens read",
}

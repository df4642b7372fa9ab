"""FLUX.2 dev, FLUX.2 Klein, its inpainting and Klein-KV."""

from .adapter import Flux2Adapter

__all__ = ["FAMILY", "Flux2Adapter"]

FAMILY = Flux2Adapter()

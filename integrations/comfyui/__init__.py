"""Nodes for ComfyUI: FLUX.1 Kontext, FLUX.2 and Qwen-Image-Edit on the reference tokens that matter."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

"""FLUX.1's two kinds of block and its last layers, which other models took over: the streams of their linears."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FLUX_BLOCKS"]

FLUX_BLOCKS: Mapping[str, str] = {
    r"transformer_blocks\.\d+\.norm1(_context)?\.linear": "item",
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_qkv|to_out\.0)": "image",
    r"transformer_blocks\.\d+\.ff\..+": "image",
    r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_added_qkv|to_add_out)": "text",
    r"transformer_blocks\.\d+\.ff_context\..+": "text",
    r"single_transformer_blocks\.\d+\.norm\.linear": "item",
    r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out|attn\.(to_[qkv]|to_qkv))": "joint",
    r"norm_out\.linear": "item",
    r"proj_out": "output",
}
"""For `Adapter.streams`, beside a model's own embedders. Modulation is per block and per item."""

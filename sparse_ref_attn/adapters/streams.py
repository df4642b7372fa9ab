"""On which rows each Linear layer of the supported transformers runs: the stream maps for `cost.ModelShape`.

Regular expression over the layer's whole name -> stream; `ModelShape.from_module` explains the streams.
"""

from __future__ import annotations

__all__ = ["FLUX2_STREAMS", "FLUX_STREAMS", "QWEN_STREAMS"]

# FluxTransformer2DModel (FLUX.1, Kontext). Modulation is per block and per item.
FLUX_STREAMS = {
    r"x_embedder": "image",
    r"context_embedder": "text",
    r"time_text_embed\..+": "item",
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

# Flux2Transformer2DModel (FLUX.2 dev, Klein, Klein-KV). Modulation is shared by all blocks; in Klein-KV's extract step
# it runs again for the references, which have a fixed timestep.
FLUX2_STREAMS = {
    r"x_embedder": "image",
    r"context_embedder": "text",
    r"time_guidance_embed\..+": "reference_item",
    r"(double_stream_modulation_img|single_stream_modulation)\.linear": "reference_item",
    r"double_stream_modulation_txt\.linear": "item",
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_qkv|to_out\.0)": "image",
    r"transformer_blocks\.\d+\.ff\..+": "image",
    r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_added_qkv|to_add_out)": "text",
    r"transformer_blocks\.\d+\.ff_context\..+": "text",
    r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)": "joint",
    r"norm_out\.linear": "item",
    r"proj_out": "output",
}

# QwenImageTransformer2DModel (Qwen-Image-Edit, Edit-Plus). With zero_cond_t the references have timestep 0, and the
# timestep embedding and the image modulation run twice an item.
QWEN_STREAMS = {
    r"img_in": "image",
    r"txt_in": "text",
    r"time_text_embed\..+": "reference_item",
    r"transformer_blocks\.\d+\.img_mod\.1": "reference_item",
    r"transformer_blocks\.\d+\.txt_mod\.1": "item",
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_qkv|to_out\.0)": "image",
    r"transformer_blocks\.\d+\.img_mlp\..+": "image",
    r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_added_qkv|to_add_out)": "text",
    r"transformer_blocks\.\d+\.txt_mlp\..+": "text",
    r"norm_out\.linear": "item",
    r"proj_out": "output",
}

"""The pipelines and sizes of FLUX.2."""

from __future__ import annotations

from ...adapters.pipeline_facts import PipelineFacts
from ...adapters.published_size import PublishedSize
from .cache import keep_references

__all__ = ["PIPELINES", "PUBLISHED"]

DEV = PipelineFacts("diffusers.Flux2Pipeline", references=(0, None))
KLEIN = PipelineFacts("diffusers.Flux2KleinPipeline", references=(0, None))
KLEIN_KV = PipelineFacts("diffusers.Flux2KleinKVPipeline", references=(0, None), distilled=True)
KLEIN_INPAINT = PipelineFacts("diffusers.Flux2KleinInpaintPipeline", references=(1, 1), edits=False)
PIPELINES = (DEV, KLEIN, KLEIN_KV, KLEIN_INPAINT)

_9B = {
    "guidance_embeds": False,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
_4B = {
    "guidance_embeds": False,
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
}
PUBLISHED = {
    "flux2-dev": PublishedSize(DEV, 32.2),
    "klein-9b": PublishedSize(KLEIN, 9.1, _9B, distilled=True),
    "klein-9b-kv": PublishedSize(KLEIN_KV, 9.1, _9B, distilled=True, prepare=keep_references),
    "klein-4b": PublishedSize(KLEIN, 3.9, _4B, distilled=True),
}

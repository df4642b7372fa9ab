"""Every touch of diffusers' internals, in one place, checked when a model is patched.

The rest of the library uses torch's own module hooks and the public attributes of pipelines; a test holds that.
"""

from .answered import AnsweredAttention
from .attention import (
    SLOT,
    AttentionSite,
    KeptRoute,
    Route,
    Tap,
    answerable,
    answered_layer,
    attention_sites,
    check_measurable,
    chosen_backend,
    dispatches,
    gives_lse,
    layers_of,
    of_heads,
    routed_attention,
    tapped,
    tapped_attention,
)
from .caches import (
    cached_modules,
    check_no_step_cache,
    reset_step_cache,
    splits_the_sequence,
    step_cache_active,
)
from .checkpointing import around_reruns
from .parts import (
    applied_loras,
    check_parts,
    encoded_reference,
    missing_parts,
    offload_hook,
    packed_reference,
    tensors_on_disk,
    weights_folder,
)
from .private_backend import Attention, PrivateBackend, note_thread
from .self_check import check_diffusers
from .versions import TESTED, internal

__all__ = [
    "SLOT",
    "TESTED",
    "AnsweredAttention",
    "Attention",
    "AttentionSite",
    "KeptRoute",
    "PrivateBackend",
    "Route",
    "Tap",
    "answerable",
    "answered_layer",
    "applied_loras",
    "around_reruns",
    "attention_sites",
    "cached_modules",
    "check_diffusers",
    "check_measurable",
    "check_no_step_cache",
    "check_parts",
    "chosen_backend",
    "dispatches",
    "encoded_reference",
    "gives_lse",
    "internal",
    "layers_of",
    "missing_parts",
    "note_thread",
    "of_heads",
    "offload_hook",
    "packed_reference",
    "reset_step_cache",
    "routed_attention",
    "splits_the_sequence",
    "step_cache_active",
    "tapped",
    "tapped_attention",
    "tensors_on_disk",
    "weights_folder",
]

"""Fine-tuning with random token dropping, under any trainer."""

from .drop_reference import drop_reference
from .handle import TrainingHandle
from .patching import patch_for_training
from .random_drop import RandomDrop

__all__ = ["RandomDrop", "TrainingHandle", "drop_reference", "patch_for_training"]

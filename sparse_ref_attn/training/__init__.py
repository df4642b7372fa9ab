"""Fine-tuning with random token dropping or isolated references, under any trainer."""

from .drop_reference import drop_reference
from .handle import TrainingHandle
from .isolate_references import IsolateReferences
from .patching import patch_for_training
from .random_drop import RandomDrop

__all__ = ["IsolateReferences", "RandomDrop", "TrainingHandle", "drop_reference", "patch_for_training"]

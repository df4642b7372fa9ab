"""The path under which `models.named_model` was documented; it stays."""

from ..models import MODELS, named_model

__all__ = ["MODELS", "named_model"]

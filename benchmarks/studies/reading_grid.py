"""Every setting of `reading`, on few subjects: which of them are worth a longer comparison."""

from .reading import every as cases

__all__ = ["cases"]

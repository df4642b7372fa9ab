"""Every error the library raises on purpose. Each message says what must hold, then what was got."""

__all__ = [
    "BatchError",
    "BudgetError",
    "BuildError",
    "ConfigError",
    "HandleRemovedError",
    "IncompatibleError",
    "KernelError",
    "LayoutError",
    "NonFiniteError",
    "PixelsUnavailableError",
    "SparseRefError",
    "UnsupportedModelError",
    "VersionError",
]


class SparseRefError(Exception):
    """Base of every error of this library; catch it to catch them all."""


class ConfigError(SparseRefError, ValueError):
    """A setting is outside its range, or two settings contradict each other."""


class BudgetError(SparseRefError, ValueError):
    """A budget asks for tokens that the references do not have, or for none at all."""


class LayoutError(SparseRefError, ValueError):
    """The tokens of a call do not match what the adapter or a selection was made for."""


class NonFiniteError(SparseRefError, ValueError):
    """Scores or latents hold NaN or infinity, so no ranking can be made from them."""


class PixelsUnavailableError(SparseRefError, ValueError):
    """A selector needs the reference's pixels, and the pipeline was given latents or no VAE."""


class UnsupportedModelError(SparseRefError, TypeError):
    """No adapter is registered for the class of the model."""


class VersionError(SparseRefError, RuntimeError):
    """An installed package is outside the range this library was written for."""


class IncompatibleError(SparseRefError, RuntimeError):
    """The model is in a state (whole-model compile, step cache) that token dropping would break."""


class HandleRemovedError(SparseRefError, RuntimeError):
    """A handle was used after ``remove()``."""


class BatchError(SparseRefError, RuntimeError):
    """One item of a batch failed, and so the batch ended; `item` is its number, ``__cause__`` what it raised."""

    def __init__(self, message: str, item: int) -> None:
        super().__init__(message)
        self.item = item

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.item)


class BuildError(SparseRefError, RuntimeError):
    """Kernels could not be built: a tool is missing, or it failed."""


class KernelError(SparseRefError, RuntimeError):
    """A CUDA C++ kernel failed on the device, or refused what the library should not have given it."""

"""What other libraries log and draw while a command runs."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["hushed", "quiet"]

_OPTIONAL_PARTS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def quiet(pipelines_too: bool) -> None:
    """Silence notes about optional parts that other libraries lack; diffusers may warn about a real model's call."""
    for name in _OPTIONAL_PARTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("transformers", "diffusers")[: 1 + pipelines_too]:
        _logging(name).set_verbosity_error()


@contextmanager
def hushed(silent: bool) -> Iterator[None]:
    """Inside, if `silent`, libraries draw no bars and log errors alone."""
    if not silent:
        yield
        return
    logger = logging.getLogger("sparse_ref_attn")
    level = logger.level
    logger.setLevel(logging.ERROR)
    others = [_logging(name) for name in ("diffusers", "transformers")]
    levels = [other.get_verbosity() for other in others]
    for other in others:
        other.disable_progress_bar()
        other.set_verbosity_error()
    try:
        yield
    finally:
        logger.setLevel(level)
        for other, before in zip(others, levels, strict=True):
            other.enable_progress_bar()
            other.set_verbosity(before)


def _logging(name: str) -> Any:
    return importlib.import_module(f"{name}.utils.logging")

"""The keyword arguments of a pipeline's call, checked before anything is computed."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..adapters.pipeline_facts import PipelineFacts
from ..errors import ConfigError, UnsupportedModelError
from ..models import edit_facts, edit_pipelines

__all__ = [
    "RESERVED", "call_arguments", "check_class", "check_more", "check_reserved", "check_size", "check_words",
    "guidance_argument",
]  # fmt: skip

RESERVED = {
    "image": "the references are arguments of their own",
    "prompt": "the prompt is an argument of its own",
    "height": "the size is an argument of its own",
    "width": "the size is an argument of its own",
    "num_inference_steps": "the number of steps is an argument of its own",
    "generator": "the seed is an argument of its own",
    "num_images_per_prompt": "a call makes one picture; other seeds make others",
    "output_type": "what is compared and saved is a picture",
    "return_dict": "what is compared and saved is a picture",
}
"""Arguments of a pipeline's call that are said otherwise, and why."""


def call_arguments(
    pipe: Any,
    images: Sequence[Any],
    prompt: str,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    negative: str | None = None,
    guidance: float | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The keyword arguments of ``pipe(...)``, without the generator.

    Parameters
    ----------
    pipe : diffusers pipeline
    images : sequence of PIL.Image.Image
        The references.
    prompt : str
    size : (int, int), optional
        Height and width of the output in pixels; default the pipeline's own choice.
    steps : int, optional
        Default the pipeline's own, 4 of a distilled model.
    negative : str, optional
        The negative prompt.
    guidance : float, optional
        By the argument that `guidance_argument` names.
    more : mapping, optional
        Further arguments of the pipeline's ``__call__``, none of `RESERVED`.

    Raises
    ------
    ConfigError
        If the pipeline takes one reference and gets several, cannot make the size or takes none, or `more`, the
        negative prompt or the guidance is not for it.
    UnsupportedModelError
        If the pipeline is none of those that edit reference images.
    """
    facts = check_class(pipe)
    distilled = getattr(pipe.config, "is_distilled", None)
    check_more(type(pipe), more or {})
    facts.check_references(len(images))
    check_words(type(pipe), distilled, negative=negative, guidance=guidance, more=more or {})
    parameters = inspect.signature(type(pipe).__call__).parameters
    if size is not None:
        if "height" not in parameters:
            raise ConfigError(
                f"the size must be left to {facts.name}, which makes a million pixels in the reference's shape, got "
                f"{size[0]} x {size[1]}"
            )
        check_size(2 * getattr(pipe, "vae_scale_factor", 8), size)
    arguments: dict[str, Any] = {"prompt": prompt, "image": list(images) if len(images) > 1 else images[0]}
    if size is not None:
        arguments |= {"height": size[0], "width": size[1]}
        if facts.area is not None and facts.area in parameters:
            arguments[facts.area] = size[0] * size[1]
    if negative is not None:
        arguments["negative_prompt"] = negative
    if guidance is not None:
        arguments[str(guidance_argument(type(pipe)))] = guidance
    arguments["num_inference_steps"] = facts.steps(distilled) if steps is None else steps
    return arguments | dict(more or {})


def guidance_argument(cls: type) -> str | None:
    """What a pipeline's class calls the strength of its prompt; None where it has none.

    Examples
    --------
    >>> import diffusers
    >>> guidance_argument(diffusers.FluxKontextPipeline), guidance_argument(diffusers.QwenImageEditPipeline)
    ('guidance_scale', 'true_cfg_scale')
    """
    parameters = inspect.signature(cls.__call__).parameters
    if "guidance_scale" in parameters and parameters["guidance_scale"].default is not None:
        return "guidance_scale"
    return "true_cfg_scale" if "true_cfg_scale" in parameters else None


def check_words(
    cls: type, distilled: bool | None, *, negative: str | None, guidance: float | None, more: Mapping[str, Any]
) -> None:
    """Raise ConfigError for a negative prompt or a guidance that a pipeline's class lacks, or that would do nothing.

    Parameters
    ----------
    cls : type
        Of the pipeline.
    distilled : bool, optional
        The pipeline's ``is_distilled``.
    negative, guidance, more
        As in `call_arguments`.
    """
    name, argument = cls.__name__, guidance_argument(cls)
    parameters = inspect.signature(cls.__call__).parameters
    if guidance is not None and (argument is None or (distilled and guidance > 1)):
        raise ConfigError(f"{name} must have no guidance, because the model is distilled, got {guidance:g}")
    if negative is not None and "negative_prompt" not in parameters:
        raise ConfigError(f"{name} must have no negative prompt, because it takes none, got {negative!r}")
    if "true_cfg_scale" not in parameters:
        return
    given = guidance if argument == "true_cfg_scale" else None
    scale = more.get("true_cfg_scale", parameters["true_cfg_scale"].default if given is None else given)
    if negative is not None and scale <= 1:
        wanted = "a guidance above 1" if argument == "true_cfg_scale" else "true_cfg_scale set above 1 (--set)"
        raise ConfigError(f"a negative prompt of {name} must come with {wanted}, or it does nothing, got {scale:g}")
    if negative is None and given is not None and given > 1:
        raise ConfigError(
            f"guidance above 1 of {name} must come with a negative prompt (a blank one will do), or it does nothing, "
            f"got {given:g}"
        )


def check_class(pipe: Any) -> PipelineFacts:
    """What is known of the published class that the pipeline is, or derives from."""
    if (facts := edit_facts(pipe)) is not None:
        return facts
    known = ", ".join(facts.name for facts in edit_pipelines())
    raise UnsupportedModelError(
        f"the pipeline must be one of {known}, got {type(pipe).__name__}; others (inpainting, "
        "your own) are patched from Python: sparse_ref_attn.patch(pipe)"
    )


def check_reserved(more: Iterable[str]) -> None:
    """Raise ConfigError for arguments of the call that are said otherwise."""
    for name in more:
        if name in RESERVED:
            raise ConfigError(f"{name} must not be set beside the call: {RESERVED[name]}")


def check_more(cls: type, more: Mapping[str, Any]) -> None:
    """Raise ConfigError as `check_reserved`, and for arguments that a pipeline's class lacks or of a wrong type."""
    check_reserved(more)
    unknown = sorted(set(more) - set(inspect.signature(cls.__call__).parameters))
    if unknown:
        raise ConfigError(f"{cls.__name__} must have the arguments that are set, got {', '.join(unknown)}")
    hints = _hints(cls.__call__)
    for name, value in more.items():
        if name in hints and not _fits(value, hints[name]):
            raise ConfigError(f"{name} of {cls.__name__} must be {_named(hints[name])}, got {value!r}")


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError, SyntaxError):  # an annotation of somebody's own that does not resolve
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is what an annotation says; lists stand for tuples, and whole numbers for floats."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if hint in (None, type(None)):
        return value is None
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float))
    if (origin or hint) in (list, tuple):
        items = [one for one in inner if one is not Ellipsis]
        return isinstance(value, (list, tuple)) and (not items or all(_fits(v, items[0]) for v in value))
    kind = origin or hint
    return kind is Any or (isinstance(kind, type) and isinstance(value, kind))


def _named(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return text.replace("typing.", "").replace("NoneType", "None")


def check_size(cell: int, size: tuple[int, int]) -> None:
    """Raise ConfigError where a pipeline would round the height and width to its `cell` without a word."""
    if any(side % cell for side in size):
        low = tuple(max(cell, side // cell * cell) for side in size)
        high = tuple(-(-side // cell) * cell for side in size)
        raise ConfigError(
            f"height and width must be multiples of {cell} pixels, got {size[0]} x {size[1]}: "
            f"{low[0]} x {low[1]} or {high[0]} x {high[1]}"
        )

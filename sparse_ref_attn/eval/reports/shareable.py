"""What of a document may be given away: numbers and settings, and pictures and words only if asked for."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["shareable"]

_QUALITY = 90
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def shareable(found: Mapping[str, Any], pictures: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A copy without anything that the user wrote, drew or named, unless pictures are given.

    Parameters
    ----------
    found : mapping
        Of `document`.
    pictures : mapping of str to PIL.Image.Image, optional
        They go in as JPEGs; the prompt and the other words of the call then stay.

    Returns
    -------
    dict
        With "shared", which says what was left out. A model is named where it is a hub id, never by its path.

    Examples
    --------
    >>> about = {"model": "/home/me/kontext", "arguments": {"prompt": "a cup", "guidance_scale": 2.5, "steps": 28}}
    >>> given = shareable({"about": about})
    >>> given["about"]["arguments"], given["about"]["model"], given["shared"]["left_out"]
    ({'guidance_scale': 2.5, 'steps': 28}, None, ['model', 'prompt'])
    """
    about = dict(found["about"])
    left = []
    if about["model"] is not None and (os.path.exists(about["model"]) or not _HUB.fullmatch(about["model"])):
        about["model"] = None
        left.append("model")
    if pictures is None:
        told = [name for name, value in about["arguments"].items() if not _of_numbers(value)]
        about["arguments"] = {name: value for name, value in about["arguments"].items() if name not in told}
        left += told
    inline = {name: _jpeg(picture) for name, picture in (pictures or {}).items()}
    return {**found, "about": about, "shared": {"left_out": sorted(left), "pictures": inline}}


def _of_numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_of_numbers, value))
    return value is None or isinstance(value, (bool, int, float))


def _jpeg(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

"""The attention of one call, measured on its way through ComfyUI's override of attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_ref_attn.errors import LayoutError
from sparse_ref_attn.hooks.diffusers import of_heads
from sparse_ref_attn.run import Run

__all__ = ["Listener"]

_BEHIND_HEADS = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")


class Listener:
    """ComfyUI's ``optimized_attention_override``: hands each attention call on, and measures those over all rows.

    Parameters
    ----------
    run : Run
    step : int
    call : object
        Has the `adapter` and the `layout` of the call.
    before : callable, optional
        The override that was there, which the call is handed on to.
    """

    def __init__(self, run: Run, step: int, call: Any, before: Any = None) -> None:
        self._run, self._step, self._call, self._before = run, step, call, before
        self._block = 0

    def __call__(self, attend: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(_BEHIND_HEADS, args, strict=False)) | kwargs
        by_heads = [x.transpose(1, 2) if given.get("skip_reshape") else x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
        self._measure(*by_heads, given.get("mask"))
        if self._before is not None:
            return self._before(attend, q, k, v, heads, *args, **kwargs)
        return attend(q, k, v, heads, *args, **kwargs)

    def _measure(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """One call (B, S, H, C); of other keys, such as those of an image prompt, it passes by."""
        k, v = (of_heads(x, q.shape[2]) for x in (k, v))
        if mask is not None:
            mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
        try:
            view = self._call.adapter.view(self._call.layout, q, k, v, mask)
        except LayoutError:
            if q.shape[1] == k.shape[1] == self._call.layout.text + self._call.layout.rows:
                raise
            return
        block, self._block = self._block, self._block + 1
        if view is not None and self._run.profile.measures(self._step, block):
            self._run.observe(self._step, block, view)

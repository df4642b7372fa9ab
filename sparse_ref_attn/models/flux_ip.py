"""The image prompt of FLUX's IP-Adapter: few tokens, which each double block attends to beside its own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ..adapters.base import Adapter, Found, Kwargs
from ..adapters.row_arguments import take_rows
from ..adapters.shortened import Shortened
from ..adapters.stream import own_rows
from ..cost import ModelShape
from ..errors import IncompatibleError, LayoutError, UnsupportedModelError
from ..hooks.diffusers import AttentionSite, attention_sites
from ..hooks.instance import InstanceHook
from ..run import AttentionView
from ..selection import Reduced
from ..types import Reference, TokenLayout

__all__ = ["IPAdapterTokens"]

_TOKENS, _GRIDS = "ip_tokens", "ip_pictures"
_EMBEDS, _STATES = "ip_adapter_image_embeds", "ip_hidden_states"


class IPAdapterTokens(Adapter):
    """Selects among the tokens of an IP-Adapter's pictures, as ReCAST does with 64 of 128 (its section 3.4).

    To be given to `patch`: the tokens of the image prompt are then the references, and those of the sequence, a
    Kontext picture included, are the generation, whose attention to them is measured. Every call has those that are
    kept, as keys of the IP-Adapter's own attention; the sequence stays as long as it is, so the time saved is small.
    A negative image prompt loses the same tokens.

    Raises
    ------
    UnsupportedModelError
        By `patch`, if the transformer has no IP-Adapter, or has several.

    Notes
    -----
    Its tokens lie on no grid and are made of no pixels that the pipeline encodes: a rule reads attention ("mass") or
    the tokens ("cosine", "random"). FLOPs are not counted; storing keys, leaving by depth and `sra.batch` are refused.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> adapter = sra.IPAdapterTokens()
    >>> adapter.name
    'FLUX IP-Adapter'

    With a pipeline ``pipe`` after ``pipe.load_ip_adapter(...)``:
    ``sra.patch(pipe, sra.SparseRef("mass", 64), adapter=adapter)``.
    """

    name = "FLUX IP-Adapter"
    classes = ("diffusers.models.transformers.transformer_flux.FluxTransformer2DModel",)
    references = _TOKENS
    guided_apart = True
    parts: ClassVar[tuple[str, ...]] = ("encoder_hid_proj", "transformer_blocks")

    def check(self, transformer: nn.Module) -> None:
        projections = getattr(transformer, "encoder_hid_proj", None)
        count = 0 if projections is None else len(getattr(projections, "image_projection_layers", ()))
        if count != 1 or not self.sites(transformer):
            raise UnsupportedModelError(
                "to select among an IP-Adapter's tokens, the transformer must have one, by load_ip_adapter, got "
                f"{count}"
            )
        super().check(transformer)

    def bind(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
        """The image prompt, projected as the forward does, becomes an argument with a row for each token."""
        kwargs = super().bind(transformer, args, kwargs)
        given = dict(kwargs.get(self.attention_arguments) or {})
        project: Any = getattr(transformer, "encoder_hid_proj", None)
        if _EMBEDS in given and project is not None:
            given[_STATES] = project(given.pop(_EMBEDS))
        if _STATES not in given:
            return kwargs
        (states,) = given.pop(_STATES)
        pictures = states.shape[1] if states.ndim == 4 else 1
        own = {_TOKENS: states.flatten(1, -2), _GRIDS: pictures}
        return {**kwargs, self.attention_arguments: given, **own}

    def layout_key(self, kwargs: Kwargs) -> object:
        return kwargs.get(_GRIDS)

    def find(self, kwargs: Kwargs) -> Found | None:
        rows, own = kwargs["hidden_states"].shape[1], kwargs.get(_TOKENS)
        if own is None:
            return (0, rows), ()
        pictures = kwargs[_GRIDS]
        each = own.shape[1] // pictures
        return (0, rows), tuple(Reference(rows + i * each, each) for i in range(pictures))

    def mask(self, kwargs: Kwargs) -> Any:
        """That of joint attention is none of these tokens'."""
        return None

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        return take_rows(kwargs, {_TOKENS: 1}, own_rows(layout, rows))

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: list[Reduced]) -> Kwargs:  # type: ignore[override]
        raise IncompatibleError("an IP-Adapter's tokens lie on no grid, so that nothing can be merged or shrunk there")

    def hooks(self, transformer: nn.Module, shortened: Callable[[], Shortened | None]) -> list[Callable[[], None]]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
            if _TOKENS not in kwargs:
                return None
            given = {name: value for name, value in kwargs.items() if name not in (_TOKENS, _GRIDS)}
            states = {**given[self.attention_arguments], _STATES: [kwargs[_TOKENS]]}
            return args, {**given, self.attention_arguments: states}

        return [transformer.register_forward_pre_hook(InstanceHook(transformer, before), with_kwargs=True).remove]

    def sites(self, transformer: nn.Module) -> list[AttentionSite]:
        layers = [(block.attn, "double") for block in transformer.transformer_blocks]  # type: ignore[union-attr]
        return [site for site in attention_sites(layers) if hasattr(site.processor, "to_k_ip")]

    def routable(self, transformer: nn.Module) -> bool:
        """Its keys are not those of joint attention, beside which stored ones would stand."""
        return False

    def view(self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionView | None:
        """Joint attention, which comes first, is passed by."""
        rows = layout.generation[1]
        if q.shape[1] == layout.text + rows:
            return None
        if q.shape[1] != rows or k.shape[1] != layout.reference_tokens:
            raise LayoutError(
                f"attention to the image prompt must be of {rows} rows to its {layout.reference_tokens} tokens, got "
                f"{q.shape[1]} queries and {k.shape[1]} keys"
            )
        item = layout.conditional or slice(None)
        spans = tuple((r.start - rows, r.start - rows + r.length) for r in layout.references)
        return AttentionView(k[item], v[item], q[item], None, spans)

    def shape(self, transformer: nn.Module) -> ModelShape:
        raise UnsupportedModelError("the work of an IP-Adapter's tokens is not counted")

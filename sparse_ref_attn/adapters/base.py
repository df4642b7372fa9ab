"""What a model family must tell the library."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..cost import ModelShape
from ..errors import IncompatibleError
from ..functional import unpack_rows
from ..hooks.diffusers import AttentionSite, attention_sites, check_parts
from ..run import AttentionView
from ..selection import Reduced
from ..types import Reference, TokenLayout
from . import masks
from .alone import ReferencesAlone
from .attending import Attending
from .cache_hooks import CacheHooks
from .collate import sample_of, split_items, with_sample
from .depth import Block, DepthCut, blocks_of
from .joint_view import joint_view
from .pipeline_facts import PipelineFacts
from .published_size import PublishedSize
from .row_arguments import unpadded
from .shortened import Shortened
from .stream import check_found, stream_rows

__all__ = ["Adapter", "Found", "Kwargs"]

Kwargs = dict[str, Any]
Found = tuple[tuple[int, int], tuple[Reference, ...]]


class Adapter(Attending):
    """One model family. A subclass says where tokens lie; the defaults fit joint-attention DiTs.

    Subclasses set the class attributes and implement `find`, `drop` and `replace`; the rest has
    defaults. An adapter holds no state of a run.
    """

    name: ClassVar[str] = ""
    """Name in tables and messages."""
    classes: ClassVar[tuple[str, ...]] = ()
    """Full names (module.qualname) of the transformer classes."""
    pipelines: ClassVar[tuple[PipelineFacts, ...]] = ()
    """The published pipelines, and what is known of their calls."""
    published: ClassVar[Mapping[str, PublishedSize]] = {}
    """The published models by the names of `vocabulary.FAMILIES`."""
    streams: ClassVar[Mapping[str, str]] = {}
    """Which stream each Linear sees, for `cost.ModelShape.from_module`."""
    stacks: ClassVar[Mapping[str, str]] = {}
    """ModuleLists of blocks, in order of execution -> kind of their blocks ("double" or "single")."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Arguments of the forward, besides the two streams, that tell where the tokens lie."""
    attention: ClassVar[str] = "attn"
    """Name of the attention in each block of `stacks`."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Dotted names of attributes of the transformer that the adapter and its hooks rely on; checked at patch time."""
    tokens: str = "hidden_states"
    """Argument that holds the image stream (B, rows, D)."""
    references: str | None = None
    """Argument that holds the references (B, R, D), where these stand apart: rows of the stream behind `tokens`."""
    text_tokens: str | None = "encoder_hidden_states"
    """Argument that holds the text stream (B, text, D); None without text."""
    text_apart: ClassVar[bool] = False
    """Whether the image stream looks at the text in attention of its own, and joint attention has none."""
    attention_arguments: str = "joint_attention_kwargs"
    """Argument whose entries the blocks hand on to their attention."""
    per_item: ClassVar[tuple[str, ...]] = ()
    """Arguments that hold one entry for each item of a batch."""
    processors: ClassVar[tuple[str, ...]] = ()
    """Classes of attention processors with which calls can run together (see `ragged`)."""
    packs: ClassVar[bool] = False
    """Whether calls that run together lie end to end through whole blocks; otherwise they are padded."""
    guided_apart: ClassVar[bool] = False
    """Whether the branches of guidance have references of their own, which then do not tell a generation's calls."""
    cache: CacheHooks | None = None
    """How the family keeps its references' K/V between steps, if some of its pipelines do."""
    alone: ReferencesAlone | None = None
    """How the family's references run by themselves, if they can."""

    def check(self, transformer: nn.Module) -> None:
        """Raise UnsupportedModelError for a variant that cannot be served, VersionError for one without its `parts`."""
        check_parts(transformer, self.parts)

    def bind(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
        """All arguments by name."""
        if not args:
            return dict(kwargs)
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def find(self, kwargs: Kwargs) -> Found | None:
        """Generation rows (first, number) and references (none: an empty tuple), or None when the layout is not known.
        Called once a run and shape; may sync."""
        raise NotImplementedError

    def layout_key(self, kwargs: Kwargs) -> object:
        """What the layout depends on besides the number of rows, as host values."""
        return None

    def layout(self, kwargs: Kwargs, found: Found) -> TokenLayout:
        """The layout of this call.

        Raises
        ------
        LayoutError
            If the generation or a reference lies outside the rows, or they overlap; or if the call's attention mask
            is not of its rows.
        IncompatibleError
            If rows of its attention mask cannot be taken.
        """
        check_found(self, kwargs, found)
        rows, text = stream_rows(self, kwargs), self.text_rows(kwargs)
        masks.check_mask(self.mask(kwargs), kwargs[self.tokens].shape[0], text + rows)
        return TokenLayout(rows, text, *found, apart=self._text(kwargs) if self.text_apart else 0)

    def grid(self, kwargs: Kwargs, layout: TokenLayout) -> tuple[int, int] | None:
        """Height and width of the generation, whose rows run as a reference's, or None. Asked once a run; may sync."""
        return None

    def text_rows(self, kwargs: Kwargs) -> int:
        """Text rows of a call's joint sequence."""
        return 0 if self.text_apart else self._text(kwargs)

    def _text(self, kwargs: Kwargs) -> int:
        given = None if self.text_tokens is None else kwargs.get(self.text_tokens)
        return 0 if given is None else given.shape[1]

    def mask(self, kwargs: Kwargs) -> Any:
        """The caller's mask of joint attention (see `masks`), or None; None too where the model does not read it."""
        return masks.mask_in(kwargs, self.attention_arguments)

    def keys(self, kwargs: Kwargs) -> Tensor | None:
        """Joint rows of a call, text first, that may be attended to, (B, rows) bool; None for all (may sync).

        Raises
        ------
        IncompatibleError
            If the call's mask says more than that.
        """
        batch = kwargs[self.tokens].shape[0]
        return masks.joint_keys(self.mask(kwargs), batch, self.text_rows(kwargs) + stream_rows(self, kwargs))

    def notes(self, kwargs: Kwargs) -> list[str]:
        """What a run's record says of a call that begins it, in words."""
        return []

    def cut_mask(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        """The arguments with the mask of the text and of `rows` of the image stream."""
        mask = self.mask(kwargs)
        if mask is None:
            return kwargs
        batch = kwargs[self.tokens].shape[0]
        mask = masks.cut_rows(mask, batch, layout.text, rows, layout.rows)
        return masks.with_mask(kwargs, self.attention_arguments, mask)

    def reduce_mask(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        """The arguments with the mask of a call whose references are changed tokens."""
        mask = self.mask(kwargs)
        if mask is None:
            return kwargs
        mask = masks.reduce_rows(mask, kwargs[self.tokens].shape[0], layout, reduced)
        return masks.with_mask(kwargs, self.attention_arguments, mask)

    def _not_of_keys(self, kwargs: Kwargs) -> str | None:
        """Why the call's mask cannot be honoured in calls that run together, in words (see `masks.not_of_keys`)."""
        batch, rows = kwargs[self.tokens].shape[0], stream_rows(self, kwargs)
        return unpadded(kwargs, rows) or masks.not_of_keys(self.mask(kwargs), batch, self.text_rows(kwargs) + rows)

    def cached(self, kwargs: Kwargs) -> bool:
        """Whether this call attends to reference K/V of an earlier call and has no reference rows."""
        return False

    def extracts(self, kwargs: Kwargs) -> bool:
        """Whether later calls attend to this call's reference K/V."""
        return False

    def drop(self, kwargs: Kwargs, layout: TokenLayout, rows: Tensor) -> Kwargs:
        """Arguments with only `rows` (ascending) of the image stream."""
        raise NotImplementedError

    def replace(self, kwargs: Kwargs, layout: TokenLayout, reduced: Sequence[Reduced]) -> Kwargs:
        """Arguments with each reference's rows replaced by its reduced tokens at their positions."""
        raise IncompatibleError(f"the {self.name} adapter has no way to place changed tokens; use a selector")

    def restore(self, output: Any, rows: Tensor, size: int) -> Any:
        """The output with its rows back at `rows` of `size`, the others zero; of the generation alone as it is."""
        sample = sample_of(output)
        if sample.ndim != 3 or sample.shape[1] != rows.shape[0]:
            return output
        return with_sample(output, unpack_rows(sample, rows, size))

    def cannot_join(self, kwargs: Kwargs) -> str | None:
        """Why this call cannot run together with others, in words; None when it can."""
        return f"the {self.name} adapter cannot put calls together"

    def items(self, kwargs: Kwargs) -> list[Kwargs]:
        """A call taken apart into calls with a batch of one."""
        parts = split_items(kwargs, self.tokens, self.per_item)
        return [masks.of_item(part, self.attention_arguments, len(parts), i) for i, part in enumerate(parts)]

    def join(self, items: Sequence[Kwargs], shared_time: bool | None = None) -> Kwargs:
        """One call for all `items`, each with a batch of one: padded (B, ...), or packed (1, ...) end to end.

        `shared_time` tells whether they have one timestep and guidance; None asks the tensors.
        """
        raise IncompatibleError(f"the {self.name} adapter cannot put calls together")

    def key_masks(self, items: Sequence[Kwargs]) -> list[Tensor | None]:
        """Of each item's rows (text first), those that may be attended to, (rows,) bool; None for all (may sync)."""
        sizes = [self.text_rows(item) + stream_rows(self, item) for item in items]
        return [masks.item_keys(self.mask(item), rows) for item, rows in zip(items, sizes, strict=True)]

    def rotary(self, transformer: nn.Module, kwargs: Kwargs) -> tuple[Tensor, ...]:
        """Rotary tables of one item's rows, text first; not asked where calls are packed."""
        raise NotImplementedError

    def rotate(self, rotary: Sequence[Tensor], x: Tensor) -> Tensor:
        """Queries or keys (1, T, H, C) turned by the tables (T, ...) of `rotary`."""
        raise NotImplementedError

    def joined_hooks(self, transformer: nn.Module, running: Callable[[], Any]) -> list[Callable[[], None]]:
        """Further hooks for joined calls, as removers; `running()` is the `ragged.RaggedCall` that runs, or None."""
        return []

    def hooks(self, transformer: nn.Module, shortened: Callable[[], Shortened | None]) -> list[Callable[[], None]]:
        """Further hooks, as removers. `shortened()` is the running call as it was cut or changed, or None."""
        return []

    def blocks(self, transformer: nn.Module) -> list[Block]:
        """Every block, in order of execution; empty when `stacks` does not say."""
        return blocks_of(transformer, self.stacks)

    def drop_in_block(self, kind: str, kwargs: Kwargs, cut: DepthCut) -> Kwargs:
        """A block's arguments with the kept rows alone, of every tensor that has a row for each token."""
        raise NotImplementedError

    def depth_hooks(self, transformer: nn.Module, cut: DepthCut) -> list[Callable[[], None]]:
        """Hooks of a call in which references leave by depth, as removers, for a model that then counts its rows."""
        return []

    def check_depth(self, transformer: nn.Module) -> None:
        """Raise IncompatibleError when references cannot leave by depth."""
        if type(self).drop_in_block is Adapter.drop_in_block or not self.blocks(transformer):
            raise IncompatibleError(
                f"the {self.name} adapter must say what its blocks are (stacks, drop_in_block) for references to leave "
                "by depth; drop them at the input: from_block=0"
            )

    def sites(self, transformer: nn.Module) -> list[AttentionSite]:
        """Attention of each block, in order of execution; empty when it cannot be measured."""
        attention = [(block.module.get_submodule(self.attention), block.kind) for block in self.blocks(transformer)]
        return attention_sites(attention)

    def shape(self, transformer: nn.Module) -> ModelShape:
        """The model's sizes, from which its work is counted."""
        return ModelShape.from_module(transformer, self.streams, blocks=[b.name for b in self.blocks(transformer)])

    def exactness(self, transformer: nn.Module) -> str:
        """What stored keys and values of references in joint attention are later: "fixed time" where these have a time
        of their own but see rows that do not, "drifting" where they share the time of the others."""
        return "drifting"

    def view(self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionView | None:
        """Which rows of an attention call (B, S, H, C) are what: text first, then the image stream."""
        return joint_view(layout, q, k, v, mask)

    def encode(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Reference tokens (b, R, D) and grid of an image (b, 3, H, W), by the pipeline's own VAE."""
        raise IncompatibleError(f"the {self.name} adapter cannot encode images; rivals work on latents there")

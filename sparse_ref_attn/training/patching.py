"""Random token dropping inside a transformer, so that the training script needs no change."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Kwargs
from ..adapters.hooks import InstanceHook, check_free
from ..adapters.patching import resolve
from ..errors import ConfigError, IncompatibleError
from ..packing import kept_rows
from ..session import Plan
from ..types import RefSelection, TokenLayout
from .random_drop import RandomDrop

__all__ = ["TrainingHandle", "patch_for_training"]

logger = logging.getLogger("sparse_ref_attn")

_PURPOSE = "training"
_HANDLES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[TrainingHandle]] = weakref.WeakKeyDictionary()


class TrainingHandle:
    """What `patch_for_training` returns: what was kept, the state of the draws, and the way back.

    It has ``state_dict`` and ``load_state_dict``, so that
    ``accelerator.register_for_checkpointing(handle)`` saves and restores its draws.
    """

    def __init__(self, drop: RandomDrop, adapter: Adapter, rank: int | None) -> None:
        self._drop, self._adapter, self._rank = drop, adapter, rank
        self._draws = 0
        self._kept: tuple[RefSelection, ...] = ()
        self._call: tuple[Kwargs, Plan, Tensor, int] | None = None
        self._said: set[str] = set()
        self._undo = contextlib.ExitStack()
        self.removed = False

    def __repr__(self) -> str:
        return f"TrainingHandle({self._adapter.name}: {'removed' if self.removed else self._drop})"

    @property
    def drop(self) -> RandomDrop:
        """The settings of the draws."""
        return self._drop

    @property
    def kept(self) -> tuple[RefSelection, ...]:
        """What the last call in training mode kept: one selection for the batch; none without references."""
        return self._kept

    def state_dict(self) -> dict[str, int]:
        """Number of draws so far. A draw follows from the seed, the rank and its number alone, so that
        one process's state serves all of them."""
        return {"draws": self._draws}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Raises
        ------
        ConfigError
            If it is no such state.
        """
        draws = state.get("draws")
        if set(state) != {"draws"} or isinstance(draws, bool) or not isinstance(draws, int) or draws < 0:
            raise ConfigError(f"a training patch's state must be {{'draws': n}} with n >= 0, got {dict(state)}")
        self._draws = draws

    def remove(self) -> None:
        """Take the patch off: the transformer is bit for bit what it was. Calling it again does nothing."""
        self.removed = True
        self._call = None
        self._undo.close()

    # -- hooks -------------------------------------------------------------------------------

    def _install(self, transformer: nn.Module) -> None:
        before, after = (InstanceHook(transformer, hook, _PURPOSE) for hook in (self._before, self._after))
        with contextlib.ExitStack() as undo:
            undo.callback(before.disarm)
            undo.callback(after.disarm)
            undo.callback(transformer.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(transformer.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
            for off in self._adapter.hooks(transformer, lambda: None if self._call is None else self._call[:3]):
                undo.callback(off)
            self._undo = undo.pop_all()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[Any, ...], Kwargs] | None:
        self._call, self._kept = None, ()
        if not module.training:
            if torch.is_grad_enabled():
                self._say("nothing is dropped while the transformer is in eval mode: call transformer.train()")
            return None
        if torch._C._current_graph_task_id() != -1:
            raise IncompatibleError(
                "a transformer patched for training must not be checkpointed as a whole, as its second forward would "
                "draw other tokens: checkpoint its blocks, transformer.enable_gradient_checkpointing()"
            )
        draw, self._draws = self._draws, self._draws + 1
        kwargs = self._adapter.bind(module, args, kwargs)
        layout = self._layout(kwargs)
        if layout is None or not layout.references:
            return None
        selection = self._drop.draw(layout.sizes, _generator(self._drop.seed, self._stream(), draw))
        self._kept = (selection,)
        if selection.kept == layout.reference_tokens:
            return None
        selection = RefSelection(selection.indices.to(kwargs[self._adapter.tokens].device), selection.sizes)
        rows = kept_rows(layout, selection)
        self._call = (kwargs, Plan("sparse", selection), rows, layout.rows)
        return (), self._adapter.drop(kwargs, layout, rows)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> Any:
        call, self._call = self._call, None
        if call is None or output is None:
            return None
        return self._adapter.restore(output, call[2], call[3])

    def _layout(self, kwargs: Kwargs) -> TokenLayout | None:
        """Where this call's tokens are: batches differ in shape, so each call is looked at."""
        if self._adapter.cached(kwargs):
            return None
        x = kwargs.get(self._adapter.tokens)
        found = None if x is None or x.ndim != 3 else self._adapter.find(kwargs)
        if found is None:
            self._say(
                f"nothing is dropped: the layout of a call is not one that the {self._adapter.name} adapter knows"
            )
            return None
        return self._adapter.layout(kwargs, found)

    def _stream(self) -> int:
        """The number of this process, asked late: a process group may be made after the patch."""
        if self._rank is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank()
        return self._rank or 0

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", what)


def _generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on all of `key`."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def patch_for_training(
    transformer: Any, drop: RandomDrop | None = None, *, rank: int | None = None, adapter: Adapter | None = None
) -> TrainingHandle:
    """Drop random reference tokens in every training call of a transformer.

    Works under any training script that puts reference tokens and their position ids behind the
    noisy ones and slices the prediction: tokens are dropped when the transformer is called, and its
    output has its full length again, with zeros at dropped rows. While ``transformer.training`` is
    False, and in calls without references, nothing happens.

    Parameters
    ----------
    transformer : torch.nn.Module or diffusers pipeline
        A supported transformer, also inside ``DistributedDataParallel`` or a ``PeftModel``.
    drop : RandomDrop, optional
        Default ``RandomDrop()``: 10 to 100 %, uniform.
    rank : int, optional
        Which stream of draws this process takes. Default its rank in ``torch.distributed``, 0
        without. Processes that work on one batch together (tensor or context parallel) must be
        given the same number.
    adapter : Adapter, optional
        For a model that is not registered; see `register_adapter`.

    Returns
    -------
    TrainingHandle
        ``kept`` after a call, ``state_dict()``, ``remove()``.

    Raises
    ------
    UnsupportedModelError
        If the model has no adapter.
    VersionError
        If diffusers is outside the supported range.
    IncompatibleError
        If the transformer was compiled as a whole, or is patched for inference.
    ConfigError
        If `drop` is no RandomDrop.

    Notes
    -----
    Only this instance is changed, by torch's own forward hooks; a deep copy (EMA) is clean. Patching
    again replaces the patch. Tokens are chosen at the root and blocks get shorter tensors, so
    gradient checkpointing, PEFT adapters, autocast, compiled blocks and DDP work as without it.
    Dropped tokens get a gradient of exactly zero. Each call makes a new draw, from the seed, the rank
    and the number of calls so far. One host sync a call where position ids lie on a GPU.

    Examples
    --------
    >>> import sparse_ref_attn as sra
    >>> from sparse_ref_attn.eval.embedded import kontext_pipeline
    >>> transformer = kontext_pipeline(size="tiny").transformer.train()
    >>> handle = sra.patch_for_training(transformer, sra.RandomDrop(keep=(0.25, 0.5)))
    >>> ids = lambda frame: torch.cartesian_prod(torch.tensor([frame]), torch.arange(4), torch.arange(4))
    >>> prediction = transformer(
    ...     hidden_states=torch.randn(2, 32, 64), img_ids=torch.cat([ids(0), ids(1)]),
    ...     encoder_hidden_states=torch.randn(2, 8, 64), txt_ids=torch.zeros(8, 3), timestep=torch.tensor([0.2, 0.9]),
    ...     pooled_projections=torch.randn(2, 64), guidance=torch.ones(2)).sample
    >>> prediction.shape, handle.kept[0].kept
    (torch.Size([2, 32, 64]), 5)
    >>> handle.remove()
    """
    drop = RandomDrop() if drop is None else drop
    if not isinstance(drop, RandomDrop):
        raise ConfigError(f"drop must be a RandomDrop, got {type(drop).__name__}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ConfigError(f"rank must be an int of at least 0, got {rank!r}")
    model, adapter = resolve(transformer, adapter)
    check_free(model, _PURPOSE)
    handle = TrainingHandle(drop, adapter, rank)
    earlier = _HANDLES.get(model)
    replaced = None if earlier is None else earlier()
    handle._install(model)
    if replaced is not None:
        replaced.remove()
    _HANDLES[model] = weakref.ref(handle)
    logger.info("patched %s for training: %s", adapter.name, drop)
    return handle

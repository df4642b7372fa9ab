"""Random token dropping inside a transformer, so that the training script needs no change."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..adapters.base import Adapter
from ..checks import is_int
from ..errors import ConfigError, IncompatibleError
from ..hooks.instance import check_free
from ..patching.api import install, resolve
from ..patching.patch import Patch
from .draws import Draws
from .handle import TrainingHandle
from .isolate_references import IsolateReferences
from .random_drop import RandomDrop

__all__ = ["patch_for_training"]

logger = logging.getLogger("sparse_ref_attn")

PURPOSE = "training"


def patch_for_training(
    transformer: Any,
    drop: RandomDrop | IsolateReferences | None = None,
    *,
    rank: int | None = None,
    adapter: Adapter | None = None,
) -> TrainingHandle:
    """Drop random reference tokens in every training call of a transformer, or let its references run by themselves.

    Works under any training script that puts reference tokens and their position ids behind the
    noisy ones and slices the prediction: tokens are dropped when the transformer is called, and its
    output has its full length again, with zeros at dropped rows. While ``transformer.training`` is
    False, and in calls without references, nothing happens.

    Parameters
    ----------
    transformer : torch.nn.Module or diffusers pipeline
        A supported transformer, also inside ``DistributedDataParallel`` or a ``PeftModel``.
    drop : RandomDrop or IsolateReferences, optional
        Default ``RandomDrop()``: 10 to 100 %, uniform. With `IsolateReferences` the references run by themselves, and
        text and generation read their keys and values.
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
        If the transformer was compiled as a whole, is patched for inference, or with ``per_sample=True``
        has attention that cannot tell items apart; or if it is in ``DataParallel``. At a call: if the
        transformer is checkpointed as a whole, or ``per_sample=True`` meets compiled blocks,
        context parallelism or an attention mask that is not of keys alone. With `IsolateReferences` if the family has
        no way, or its own pipeline does it (Klein-KV); at a call: under context parallelism, beside a step cache or an
        IP-Adapter, where blocks are checkpointed with reentrance, or with a mask that is not of keys alone.
    LayoutError
        At a call, if its attention mask is not of its rows.
    ConfigError
        If `drop` is neither.

    Notes
    -----
    Only this instance is changed, by torch's own forward hooks; a deep copy (EMA) is clean. Patching
    again replaces the patch. Tokens are chosen at the root and blocks get shorter tensors, so
    gradient checkpointing, PEFT adapters, autocast, compiled blocks and DDP work as without it.
    Dropped tokens get a gradient of exactly zero. Each call makes a new draw, from the seed, the rank
    and the number of calls so far. One host sync a call where position ids lie on a GPU. Values are not
    looked at: NaN in a kept token reaches the loss, in a dropped one it reaches nothing.

    With ``per_sample=True`` items of a batch differ in length. FLUX.2 modulates by timestep alone, so there they
    are packed end to end and no row is wasted. Kontext and Qwen-Image-Edit pad the items to the longest, and
    ragged attention leaves the padding out: with ratios uniform in (0.05, 1) the padded rows cost about
    1.12 / 1.22 / 1.29 times the work of equal counts for batches of 2 / 4 / 8 (arithmetic, not a measurement). The
    model's own attention kernel gives way to this library's. One draw for the batch costs nothing, and the ratios
    average over the steps instead of within each.

    With `IsolateReferences` the transformer's forward calls it once more on the references alone, within the same call,
    so that DDP sees one forward. Both stand in one graph: weights get the gradients of both, and the keys and values of
    all layers are held for the backward pass, whatever is checkpointed. Gradient checkpointing works for blocks that
    diffusers checkpoints. Compiled blocks run uncompiled. Calls in eval mode and without gradients are isolated too, as
    that is the model that is trained, and read everything. Rows of references are zero in the output.

    Examples
    --------
    >>> import torch, sparse_ref_attn as sra
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
    if not isinstance(drop, (RandomDrop, IsolateReferences)):
        raise ConfigError(f"drop must be a RandomDrop or IsolateReferences, got {type(drop).__name__}")
    if rank is not None and not is_int(rank, 0):
        raise ConfigError(f"rank must be an int of at least 0, got {rank!r}")
    if isinstance(transformer, nn.DataParallel):
        raise IncompatibleError(
            "a transformer in DataParallel must not be patched, as its replicas run without hooks: use "
            "DistributedDataParallel (accelerate launch)"
        )
    model, adapter = resolve(transformer, adapter)
    check_free(model, PURPOSE)
    drawn = drop if isinstance(drop, RandomDrop) else drop.drop or RandomDrop(1.0)
    draws = Draws(model, drawn, adapter, rank, drop.isolation if isinstance(drop, IsolateReferences) else None)
    state = install(Patch(model, adapter, draws, PURPOSE), model)
    logger.info("patched %s for training: %s", adapter.name, drop)
    return TrainingHandle(draws, state, drop)

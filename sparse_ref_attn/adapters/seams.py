"""Every touch of diffusers' internals, in one file, checked when a model is patched.

The rest of the library uses torch's own module hooks and the public attributes of pipelines.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError, VersionError

__all__ = [
    "DIFFUSERS_RANGE",
    "AttentionSite",
    "PrivateBackend",
    "attention_sites",
    "check_diffusers",
    "check_measurable",
    "check_no_step_cache",
    "check_not_compiled",
    "compiled_blocks",
    "eager_blocks",
    "internal",
    "reset_step_cache",
    "rotate_pairs",
    "rotate_qwen",
    "routed_attention",
    "splits_the_sequence",
    "step_cache_active",
    "tapped_attention",
    "unwrap",
]

DIFFUSERS_RANGE = ((0, 42), (0, 43))
"""First supported and first unsupported (major, minor) of diffusers."""

Tap = Callable[[int, Tensor, Tensor, Tensor, "Tensor | None"], None]
Attention = Callable[..., Tensor]
Route = Callable[[int, Tensor, Tensor, Tensor, "Tensor | None", Attention], Tensor]


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the transformer: its processor, the kind of its block, its module if it has one."""

    processor: Any
    kind: str
    module: nn.Module | None = None


def check_diffusers() -> None:
    """Raise VersionError, with words, when the installed diffusers is outside `DIFFUSERS_RANGE`."""
    (low, high) = DIFFUSERS_RANGE
    wanted = f"diffusers >= {low[0]}.{low[1]}, < {high[0]}.{high[1]}"
    try:
        version = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError as error:
        raise VersionError(f"patching this model needs {wanted}, and diffusers is not installed") from error
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:2])
    if not low <= (major, minor) < high:
        raise VersionError(
            f"patching needs {wanted}, got {version}: the seams this library relies on were checked for that range only"
        )
    registry = getattr(_dispatch(), "_AttentionBackendRegistry", None)
    missing = [n for n in ("_backends", "_constraints", "_supported_arg_names") if not hasattr(registry, n)]
    if missing:
        raise VersionError(f"diffusers {version} must keep the attention backend registry's {missing}; they are gone")


def _dispatch() -> Any:
    return importlib.import_module("diffusers.models.attention_dispatch")


def internal(module: str, name: str) -> Any:
    """A class of diffusers that its public interface does not name.

    Raises
    ------
    VersionError
        If it is gone.
    """
    found = getattr(importlib.import_module(f"diffusers.{module}"), name, None)
    if found is None:
        raise VersionError(f"diffusers {importlib.metadata.version('diffusers')} must have {module}.{name}; it is gone")
    return found


def unwrap(module: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel, PeftModel and the like."""
    while True:
        base: Any = getattr(module, "get_base_model", None)
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif base is not None:
            module = base()
        else:
            return module


def check_not_compiled(module: nn.Module) -> None:
    """Raise IncompatibleError for a module compiled as a whole: hooks added to it never fire."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    if compiled or type(module).__name__ == "OptimizedModule":
        raise IncompatibleError(
            "the transformer must not be compiled as a whole when it is patched (torch never calls hooks added "
            f"later), got a compiled {type(module).__name__}. Patch first, then compile its blocks: "
            "transformer.compile_repeated_blocks(fullgraph=True)"
        )


def compiled_blocks(module: nn.Module) -> bool:
    """Whether the module or one inside it is compiled."""
    return any(getattr(m, "_compiled_call_impl", None) is not None for m in module.modules())


@contextlib.contextmanager
def eager_blocks(module: nn.Module) -> Iterator[None]:
    """Run compiled blocks eagerly inside, so that a profiling step neither recompiles nor breaks them."""
    if not compiled_blocks(module):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def step_cache_active(module: nn.Module) -> bool:
    """Whether a cache that reuses activations of earlier steps is on (diffusers' own, or cache-dit's)."""
    return bool(getattr(module, "is_cache_enabled", False) or getattr(module, "_is_cached", False))


def splits_the_sequence(module: nn.Module) -> bool:
    """Whether diffusers' context parallelism gives each process a part of the sequence."""
    parallel = getattr(module, "_parallel_config", None)
    return parallel is not None and getattr(parallel, "context_parallel_config", None) is not None


def check_no_step_cache(module: nn.Module) -> None:
    """Raise IncompatibleError where a step cache is on: it keeps activations of one call."""
    if step_cache_active(module):
        raise IncompatibleError(
            "calls that run together must not go through a step cache, which keeps activations of one call; got one "
            f"on {type(module).__name__}. Disable it"
        )


def reset_step_cache(module: nn.Module) -> None:
    """Forget what an active step cache has stored; its next step computes in full.

    It may run inside the pipeline's ``cache_context``, which the reset would end.
    """
    reset = getattr(module, "_reset_stateful_cache", None)
    if reset is None:
        return
    hooks = [h for m in module.modules() for h in getattr(getattr(m, "_diffusers_hook", None), "hooks", {}).values()]
    states = [state for hook in hooks for state in vars(hook).values() if hasattr(state, "set_context")]
    contexts = [state._context for state in states]
    reset()
    for state, context in zip(states, contexts, strict=True):
        state.set_context(context)


def attention_sites(blocks: Sequence[tuple[nn.Module, str]]) -> list[AttentionSite]:
    """One site for each (attention module, kind), in order of execution."""
    return [AttentionSite(attn.processor, kind, attn) for attn, kind in blocks if hasattr(attn, "processor")]


def check_measurable(sites: Sequence[AttentionSite], model: str) -> None:
    """Raise IncompatibleError when attention cannot be measured on this model."""
    blind = [type(site.processor).__name__ for site in sites if not hasattr(site.processor, "_attention_backend")]
    if not sites or blind:
        raise IncompatibleError(
            f"this selector looks at attention, so {model}'s attention must go through processors that dispatch to "
            f"attention backends; got {sorted(set(blind)) or 'no attention sites'}. Use a selector that does not"
        )


@contextlib.contextmanager
def tapped_attention(
    sites: Sequence[AttentionSite], tap: Tap, after: Callable[[int], None] = lambda site: None
) -> Iterator[None]:
    """Inside, `tap(i, q, k, v, mask)` sees every attention call of site i, q, k, v (B, S, H, C) after RoPE.

    `after(i)` is called when the attention itself is done.
    """

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Attention) -> Tensor:
        tap(i, q, k, v, mask)
        out = own()
        after(i)
        return out

    with routed_attention(sites, attend):
        yield


@contextlib.contextmanager
def routed_attention(sites: Sequence[AttentionSite], attend: Route) -> Iterator[None]:
    """Inside, `attend(i, q, k, v, mask, own)` answers every attention call of site i, q, k, v (B, S, H, C) after RoPE.

    ``own(k, v)`` is the user's own attention of q and the mask, by default over the call's own k and v.
    Each processor gets a private backend.
    """
    with contextlib.ExitStack() as undo:
        for i, site in enumerate(sites):

            def answer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, user: Attention, i: int = i) -> Tensor:
                return attend(i, q, k, v, mask, user)

            backend = PrivateBackend(site.processor, answer)
            undo.callback(backend.remove)
            backend.enter()
        yield


Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Attention], Tensor]


class PrivateBackend:
    """An attention backend for one processor, in force from `enter` to `leave`.

    It is an unlisted ``AttentionBackendName``, so the public enum stays as it is. Those of one processor may leave in
    any order: a call that was broken off leaves when the next one comes, which may have entered by then.

    Parameters
    ----------
    processor : object
        A processor that dispatches to attention backends.
    attend : callable
        ``attend(q, k, v, mask, user)`` with q, k, v (B, S, H, C); ``user()`` is what the processor's
        own backend makes of the same call, ``user(k, v)`` of other keys and values.
    """

    def __init__(self, processor: Any, attend: Attend) -> None:
        self._dispatch = _dispatch()
        self._processor = processor
        self._inner: Any = None
        self._own: bool | None = None
        value = f"sparse_ref_attn_{id(processor)}_{id(self)}"
        self._member = str.__new__(self._dispatch.AttentionBackendName, value)
        self._member._name_, self._member._value_, self._member.owner = value.upper(), value, self

        def backend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
            _parallel_config: Any = None,
        ) -> Tensor:
            def user(k: Tensor = key, v: Tensor = value) -> Tensor:
                return self._dispatch.dispatch_attention_fn(
                    query,
                    k,
                    v,
                    attn_mask=attn_mask,
                    dropout_p=dropout_p,
                    is_causal=is_causal,
                    scale=scale,
                    enable_gqa=enable_gqa,
                    backend=self._inner,
                    parallel_config=_parallel_config,
                )

            return attend(query, key, value, attn_mask, user)

        self._dispatch._AttentionBackendRegistry.register(self._member)(backend)

    def enter(self) -> None:
        """Serve the processor's attention from now on."""
        if self._own is None:
            self._own = "_attention_backend" in vars(self._processor)
            self._inner = self._processor._attention_backend
            self._processor._attention_backend = self._member

    def leave(self) -> None:
        """Give the processor its own backend back."""
        if self._own is None:
            return
        later = self._entered_on_top()
        if later is not None:
            later._own, later._inner = self._own, self._inner
        elif self._own:
            self._processor._attention_backend = self._inner
        else:
            del self._processor._attention_backend
        self._own = None

    def _entered_on_top(self) -> PrivateBackend | None:
        """The backend that this one would have to be given back to."""
        backend = getattr(self._processor._attention_backend, "owner", None)
        while backend is not None and backend._inner is not self._member:
            backend = getattr(backend._inner, "owner", None)
        return backend

    def remove(self) -> None:
        """Leave for good."""
        self.leave()
        registry = self._dispatch._AttentionBackendRegistry
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(self._member, None)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """FLUX's rotary embedding of x (B, S, H, C) by tables (S, C)."""
    module = importlib.import_module("diffusers.models.embeddings")
    return module.apply_rotary_emb(x, (cos, sin), sequence_dim=1)


def rotate_qwen(x: Tensor, table: Tensor) -> Tensor:
    """Qwen-Image's rotary embedding of x (B, S, H, C) by a complex table (S, C / 2)."""
    module = importlib.import_module("diffusers.models.transformers.transformer_qwenimage")
    return module.apply_rotary_emb_qwen(x, table, use_real=False)


def tensors_on_disk(module: nn.Module) -> dict[int, tuple[str, str]]:
    """Weights that group offloading keeps in files: (safetensors file, key) by the tensor's id.

    What the module then has in their place is memory that nobody filled.
    """
    found: dict[int, tuple[str, str]] = {}
    for each in module.modules():
        hook = getattr(getattr(each, "_diffusers_hook", None), "hooks", {}).get("group_offloading")
        group = getattr(hook, "group", None)
        if group is not None and getattr(group, "_is_offloaded_to_disk", False):
            found |= {id(x): (group.safetensors_file_path, key) for x, key in group.tensor_to_key.items()}
    return found

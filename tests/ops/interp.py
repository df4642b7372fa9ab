"""Triton's interpreter, with a bf16 that is right, and without what it does again at each call.

Triton's interpreter (3.6 to 3.9) keeps bf16 as raw uint16: ``tl.dot`` multiplies the bit patterns, elementwise
arithmetic too, and float32 -> bf16 truncates. `mend_bf16` makes the dot and the arithmetic run in float32 and the cast
round to nearest even, as the hardware does. fp16 and fp32 are right as they are.

It also replaces all of ``tl`` anew at each call of a function by a kernel, which takes longer than what the function
does, and puts it back after each launch: `patch_once` makes it do so once, by functions that do not ask how they are
called. And it computes at each integer operation whether it overflows, for an assertion that it then leaves out (there
is one under ``debug`` alone), and finds numpy's dtype in a table that it makes each time: `spare` has it do neither.
Most of the rest went into the types of blocks, which every operation on one makes again: `remember_types` keeps what a
type and its shape are made of, `remember_operands` how two of them meet.

The interpreter is chosen when ``@triton.jit`` decorates, so one process is either interpreted or not: tests that launch
kernels live in ``tests/ops/interpreted`` (collected only under ``TRITON_INTERPRET=1``; `tests/ops/test_interpreted.py`
runs its files in a process of its own). Beside this file: `guards` (canary borders, NaN poison), `tolerance`
(how far off a result may be). What the compiler makes of a kernel is for `benchmarks.aot`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["mend_bf16", "patch_once", "remember_operands", "remember_types", "spare"]


def remember_types() -> None:
    """A block type, a tensor of a type and two broadcast types are made as the first of the same were."""
    core, semantic = tl.core, interpreter.TritonSemantic
    if hasattr(core.block_type, "remembered"):
        return
    core.block_type.remembered = True
    make_type, make_tensor, equal = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
    broadcast = semantic.broadcast_impl_value
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    pairs: dict[tuple[str, str], tuple[Any, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(x.value if isinstance(x, core.constexpr) else x for x in shape))
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle)

    def same(self: Any, other: Any) -> bool:
        return self.name == other.name if isinstance(other, core.dtype) else equal(self, other)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        names = lhs.type.name, rhs.type.name
        if names[0] == names[1]:
            return lhs, rhs
        if names not in pairs:
            out = broadcast(self, lhs, rhs)
            if lhs.type.is_block() and rhs.type.is_block() and len(lhs.shape) == len(rhs.shape):
                pairs[names] = out[0].type, out[1].type
            return out

        def stretched(x: Any, type: Any) -> Any:
            if x.type.name == type.name:
                return x
            return self.tensor(self.builder.create_broadcast(x.handle, list(type.shape)), type)

        return stretched(lhs, pairs[names][0]), stretched(rhs, pairs[names][1])

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core.dtype.__eq__ = same
    semantic.broadcast_impl_value = broadcast_impl_value


def spare() -> None:
    """No condition for an assertion that is not made, and each dtype of numpy looked up once."""
    builder, find = interpreter.interpreter_builder, interpreter._get_np_dtype
    if not builder.options.sanitize_overflow:
        return
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    found: dict[str, np.dtype] = {}

    def get_np_dtype(dtype: tl.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype.scalar)
        return found[name]

    interpreter._get_np_dtype = get_np_dtype


def remember_operands() -> None:
    """Which type two operands take together is found out once; what a number becomes beside a type, too."""
    core, semantic = tl.core, interpreter.TritonSemantic
    if hasattr(semantic, "remembered"):
        return
    semantic.remembered = True
    check = semantic.binary_op_type_checking_impl
    known: dict[tuple[Any, ...], list[Callable[[Any, Any], Any]]] = {}

    def kind(x: Any) -> Any:
        return x.type.name if isinstance(x, core.tensor) else (type(x), x)

    def became(x: Any, y: Any) -> Callable[[Any, Any], Any]:
        """How x, or a number for x, becomes what y is but for its shape."""
        if not isinstance(x, core.tensor):
            return lambda semantic, number: y
        type = y.type.scalar
        return (lambda semantic, x: x) if x.type.scalar == type else lambda semantic, x: semantic.cast(x, type)

    def checked(self: Any, lhs: Any, rhs: Any, *how: bool, **named: bool) -> tuple[Any, Any]:
        key = kind(lhs), kind(rhs), how, tuple(named.items())
        if key not in known:
            out = check(self, lhs, rhs, *how, **named)
            known[key] = [became(x, y) for x, y in zip((lhs, rhs), out, strict=True)]
            return out
        left, right = known[key]
        return self.broadcast_impl_value(left(self, lhs), right(self, rhs))

    semantic.binary_op_type_checking_impl = checked


def patch_once() -> None:
    """Patch ``tl`` and ``tl.core`` for the first function that sees them, and for good: nothing else runs here."""
    if hasattr(interpreter, "patched_once"):
        return
    interpreter.patched_once = True
    patch = interpreter._patch_lang
    semantic = interpreter.interpreter_semantic
    done: set[tuple[bool, bool]] = set()

    @cache
    def seen(fn: Callable[..., Any]) -> tuple[bool, bool]:
        modules = fn.__globals__.values()
        return any(x is tl for x in modules), any(x is tl.core for x in modules)

    def patch_lang(fn: Callable[..., Any]) -> SimpleNamespace:
        if seen(fn) not in done:
            done.add(seen(fn))
            patch(fn)
        return SimpleNamespace(restore=lambda: None)

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        made = getattr(member, "__wrapped__", member)

        def call(*args: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return made(*args, **named)

        scope.set_attr(obj, name, call)

    interpreter._patch_lang, interpreter._patch_attr = patch_lang, patch_attr


def mend_bf16() -> None:
    """Patch the interpreter's builder, once per process."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "mended_bf16"):
        return
    builder.mended_bf16 = True
    handle = interpreter.TensorHandle
    dot, cast, binary, unary = builder.create_dot, builder.cast_impl, builder.binary_op, builder.unary_op

    def widen(x):
        return handle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self, a, b, d, *args):
        return dot(self, widen(a), widen(b), d, *args)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16:
            src = widen(src)
        if dst_type.scalar == tl.bfloat16:
            as_float = src if src.dtype.scalar == tl.float32 else cast(self, src, tl.float32)
            return handle(_round(as_float.data), tl.bfloat16)
        return src if dst_type.scalar == src.dtype.scalar else cast(self, src, dst_type)

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        out = op(_widen(lhs.data), _widen(rhs.data))
        return handle(out, tl.int1) if out.dtype == bool else handle(_round(out), tl.bfloat16)

    def unary_op(self, arg, op):
        if arg.dtype.scalar != tl.bfloat16:
            return unary(self, arg, op)
        return handle(_round(op(_widen(arg.data))), tl.bfloat16)

    def get_bf16(self, value):  # a bf16 constant: absent before 3.8
        return handle(_round(np.array([value])), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.binary_op, builder.unary_op, builder.get_bf16 = binary_op, unary_op, get_bf16


def _widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(x: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bit patterns, to nearest even."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)

"""What Triton's interpreter lacks (3.6 and 3.7): bfloat16, which it holds as uint16 and computes on the bit patterns.

Casts round to nearest even and `tl.dot` takes bf16 operands, as on a GPU. Arithmetic, comparisons, reductions and
atomics on bf16 are refused: a kernel computes on fp32 after an explicit `.to(tl.float32)`. Importing this module
patches the interpreter; `_host.py` does so under TRITON_INTERPRET=1 alone. tests/kernels/test_interpret.py notices when
Triton's own interpreter has learnt bf16 and this file can go.
"""

from functools import partial, partialmethod

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle, _get_np_dtype


def _is_bf16(value: object) -> bool:
    return isinstance(value, TensorHandle | tl.tensor) and value.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(values: np.ndarray, rounding: object = ir.ROUNDING_MODE.RTNE) -> TensorHandle:
    bits = np.asarray(values, dtype=np.float32, order="C").view(np.uint32)
    bias = 0 if rounding == ir.ROUNDING_MODE.RTZ else 0x7FFF + ((bits >> 16) & 1)
    # A NaN's payload plus the bias could carry over into infinity or zero.
    rounded = np.where(np.isnan(values), (bits >> 16) | 0x40, (bits + bias) >> 16)
    return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


def _cast(original, self, src, dst_type, *rounding):
    dst = dst_type.scalar
    if _is_bf16(src) and dst != tl.bfloat16:
        return TensorHandle(_widen(src).data.astype(_get_np_dtype(dst)), dst)
    return original(self, src, dst_type, *rounding) if dst != tl.bfloat16 else _narrow(src.data, *rounding)


def _dot(original, self, a, b, acc, *options):
    return original(self, _widen(a), _widen(b), acc, *options)


def _select(original, self, condition, a, b):
    return TensorHandle(np.where(condition.data, a.data, b.data), b.dtype.scalar)


def _refuse(original, self, *arguments):
    for value in arguments[0] if isinstance(arguments[0], tuple) else arguments:
        if _is_bf16(value):
            raise TypeError(f"{original.__name__}: no bf16 arithmetic in a kernel, convert with .to(tl.float32) first")
    return original(self, *arguments)


def _patch(owner: type, wrapper, *names: str) -> None:
    for name in names:
        setattr(owner, name, partialmethod(partial(wrapper, getattr(owner, name))))


InterpreterBuilder.get_bf16 = lambda self, value: _narrow(np.array([value]))
_patch(InterpreterBuilder, _cast, "cast_impl", "create_fp_to_fp")
_patch(InterpreterBuilder, _dot, "create_dot")
_patch(InterpreterBuilder, _select, "create_select")
_patch(InterpreterBuilder, _refuse, "unary_op", "binary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt")
_patch(InterpreterBuilder, _refuse, "create_atomic_rmw")
_patch(ReduceScanOpInterface, _refuse, "apply")

# Speed: every call of a device function patches triton.language anew, more than half of a small kernel's time, where
# once a launch is enough; and the checks of integer overflow are computed, but acted on only when debugging.
_patched: set[int] = set()


def _patch_lang_once(original, fn):
    namespace = id(fn.__globals__)
    if namespace in _patched:
        return interpreter._LangPatchScope()
    _patched.add(namespace)
    return original(fn)


def _launch(original, self, *arguments, **options):
    _patched.clear()
    return original(self, *arguments, **options)


interpreter._patch_lang = partial(_patch_lang_once, interpreter._patch_lang)
_patch(interpreter.GridExecutor, _launch, "__call__")
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

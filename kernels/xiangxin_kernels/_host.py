"""Host-side plumbing shared by the kernel files: op registration and argument checks. No device code."""

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRET:
    from . import _interpret  # noqa: F401 (patches Triton's interpreter)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("xiangxin", "DEF")


def use_triton(x: Tensor) -> bool:
    """True where the Triton kernels run: on CUDA tensors, and on any tensor under TRITON_INTERPRET=1."""
    return x.is_cuda or INTERPRET


def check(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless `condition`; messages read "op: expected ..., got ..."."""
    if not condition:
        raise ValueError(message)


def check_dtypes(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all `tensors` have one dtype, and one that the Triton kernels compute in."""
    (name, first), *rest = tensors.items()
    check(first.dtype in _DTYPES, f"{op}: expected {name} in float32, float16 or bfloat16, got {first.dtype}")
    for other, tensor in rest:
        check(tensor.dtype == first.dtype, f"{op}: expected {other} in {first.dtype} like {name}, got {tensor.dtype}")


def in_autocast_dtype(first: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments, cast as nn.Linear's are where autocast is enabled for the device of the first."""
    device = first.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return first, *others
    return tuple(t if t is None else t.to(torch.get_autocast_dtype(device)) for t in (first, *others))


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [N, C] with a contiguous last axis: a view wherever the strides allow one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _on_device(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current one, on which Triton launches; nothing, and at no cost, where it is already."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def kernel_op(*, mutates: tuple[str, ...]) -> Callable:
    """Registers a launcher `_name(tensors..., numbers...) -> None` as the op `xiangxin::name` and returns the op.

    The launcher writes only the arguments in `mutates`; since it returns nothing, the fake implementation is a no-op.
    It must have no default values: the dispatcher drops arguments equal to their default. `define`/`impl` ops do not
    bump the version counter of what they write, without which autograd cannot see a saved tensor overwritten.
    """

    def register(launch: Callable) -> Callable:
        name = launch.__name__.lstrip("_")
        parameters = inspect.signature(launch).parameters
        assert all(p.default is p.empty for p in parameters.values()), f"{name}: launchers take no default values"
        written = [list(parameters).index(argument) for argument in mutates]

        def run(*arguments) -> None:
            outputs = [arguments[i] for i in written if arguments[i] is not None]
            with _on_device(outputs[0].device):
                launch(*arguments)
            torch.autograd.graph.increment_version([out for out in outputs if not out.is_inference()])

        _library.define(name + torch.library.infer_schema(launch, mutates_args=mutates))
        for key in ("CPU", "CUDA"):
            _library.impl(name, run, key)
        torch.library.register_fake(f"xiangxin::{name}", lambda *arguments: None, lib=_library)
        return getattr(torch.ops.xiangxin, name).default

    return register

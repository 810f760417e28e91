"""What a case of `bench.static` is: how a config's kernels are launched, and what they have to do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

Arguments = Mapping[str, Any]
"""What a launch passed to its kernel, by parameter name, tensors included; "grid" is the number of programs."""


@dataclass(frozen=True)
class Work:
    """What a kernel has to do. `trips`: passes through each hot loop in program order, summed over all programs.

    A kernel without a hot loop leaves `trips` empty. `bodies` says how often the code around the hot loops runs, where
    that is not once per program (persistent kernels).
    """

    bytes: int
    flops: int = 0
    trips: Callable[[Arguments], tuple[float, ...]] = lambda a: ()
    bodies: Callable[[Arguments], int] = lambda a: a["grid"]


@dataclass(frozen=True)
class Case:
    """A config of an op and the kernels it launches. `module` is where the launcher looks `chooser` up."""

    name: str
    module: ModuleType
    chooser: str
    tensors: Callable[[Callable[..., Tensor]], dict[str, Tensor]]
    launch: Callable[[dict[str, Tensor]], None]
    work: Mapping[str, Work]
    candidates: Mapping[int, tuple] = field(default_factory=dict)
    judge: str = ""  # the case of bench.cases that proves a candidate right; default: the op of that name
    replaced: Mapping[str, Callable] = field(default_factory=dict)  # other names of `module`, while the case runs


def kernel_file(name: str) -> ModuleType:
    """A kernel file as a module: the front door gives its function instead."""
    return import_module(f"xiangxin_kernels.{name}")

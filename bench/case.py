"""What a case of the benches is: its inputs at a shape, what it must compute and move, and how a provider runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from xiangxin_kernels import _host

from xiangxin_fast.config import PhiConfig
from xiangxin_fast.model import Phi

MODES = ("fwd", "bwd", "fwdbwd")


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens through a model of this shape; letters as in DESIGN's words."""

    config: PhiConfig
    B: int
    T: int
    tiny: bool = False  # walks the code; its figures mean nothing, so nothing is compiled for it

    @property
    def N(self) -> int:
        return self.B * self.T

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} C={self.config.channels}"


class Unavailable(RuntimeError):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Run:
    """A provider on one set of inputs: its forward, and the tensors its backward differentiates by."""

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    comparable: bool = True  # the leaves are the case's own, so that their gradients can be judged


Inputs = dict[str, Any]
Provider = Callable[["Case", Inputs, Shape], Run]  # raises Unavailable where it cannot run


@dataclass(frozen=True)
class Case:
    """One op. `flops` and `moved` give those of "fwd" and "bwd" for a shape and the bytes of an element."""

    op: str
    reference: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    make: Callable[[Shape, "Draw"], Inputs]
    leaves: tuple[str, ...]
    flops: Callable[[Shape], dict[str, float]]
    moved: Callable[[Shape, int], dict[str, float]]
    rows: tuple[str, ...] = ()  # inputs whose axis 0 the fp64 reference may take one at a time, to spare memory
    graph: bool = False  # so short that a GPU is timed on the replay of a CUDA graph
    composite: bool = True  # the op has a torch composite, so that it runs on a CPU too

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.leaves else MODES[:1]


class Draw:
    """Seeded random tensors on one device, normal with the given std, in one dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int):
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self._generator, device=self.device) * std
        return values.to(dtype or self.dtype)

    def ids(self, *shape: int, below: int) -> Tensor:
        return torch.randint(below, shape, generator=self._generator, device=self.device)


def of_inputs(function: Callable[..., Tensor]) -> Provider:
    """The provider that calls `function` on the case's own inputs."""

    def provide(case: Case, inputs: Inputs, shape: Shape) -> Run:
        return Run(lambda: function(**inputs), tuple(inputs[name] for name in case.leaves))

    return provide


def compiled(function: Callable, shape: Shape) -> Callable:
    """torch.compile at fixed shapes; for a tiny shape dynamo alone, since code generated for it would say nothing."""
    return torch.compile(function, dynamic=False, backend="eager" if shape.tiny else "inductor")


def rotary_tables(shape: Shape, draw: Draw) -> tuple[Tensor, Tensor]:
    cos, sin = Phi(shape.config, device="meta").rotary(draw.device)
    return cos[: shape.T].contiguous(), sin[: shape.T].contiguous()


def layer_weights(config: PhiConfig) -> int:
    """Numbers in the matrices of one layer."""
    C, F = config.channels, config.mlp_hidden
    return (3 * C + F) * C + C * (C + F)


def make_inputs(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """The case's inputs, those it differentiates by requiring gradients. Unavailable where our op cannot run."""
    if not (case.composite or device.type == "cuda" or _host.INTERPRET):
        raise Unavailable(f"{case.op} needs a GPU, or TRITON_INTERPRET=1")
    inputs = case.make(shape, Draw(device, dtype, seed))
    for name in case.leaves:
        inputs[name].requires_grad_()
    return inputs


class _Seen(TorchDispatchMode):
    """Notes whether an op of xiangxin_kernels was dispatched."""

    kernel = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.kernel |= function.namespace == "xiangxin"
        return function(*args, **(kwargs or {}))


def implementation(case: Case, run: Run) -> str:
    """What stands behind the front door here: "kernels", or "composite" where only torch's own ops ran."""
    with _Seen() as seen:
        run.forward()
    return "kernels" if seen.kernel or not case.composite else "composite"

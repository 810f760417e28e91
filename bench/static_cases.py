"""The kernels as `bench.static` and `bench.tune` see them: per op a function of the shape that lists its cases.

To add an op: (1) write `def <op>(s: Shape) -> list[Case]`, a case per config in `_tuning.py`; (2) `tensors(new)` makes
what its launcher takes (`new(rows, columns)`, in the dtype under test unless told), `launch` calls the launcher;
(3) `work` names the kernels that config is for, with useful FLOPs, bytes moved at least, and how often the hot loop of
each runs, summed over the grid; (4) list `candidates` for the sweep; (5) enter the function in OPS below.
The launch itself (arguments, grid, warps) is taken from the launcher, so that what is bounded is what will run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from bench import static_checks
from bench.cases import Shape


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
    reference: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    work: Mapping[str, Work]
    candidates: Mapping[int, tuple] = field(default_factory=dict)


def check_matmul(s: Shape) -> list[Case]:
    M, N, K = s.N, s.config.mlp_hidden, s.config.channels
    work = Work(
        bytes=2 * (M * K + K * N + M * N),
        flops=2 * M * N * K,
        trips=lambda a: (M // a["BLOCK_M"] * (N // a["BLOCK_N"]) * (K // a["BLOCK_K"]),),
        bodies=lambda a: M // a["BLOCK_M"] * (N // a["BLOCK_N"]),
    )
    return [
        Case(
            name="check_matmul",
            module=static_checks,
            chooser="choose_check_matmul",
            tensors=lambda new: {"a": new(M, K), "b": new(K, N), "b_t": new(N, K), "c": new(M, N)},
            launch=static_checks.check_matmul,
            reference=lambda t: {"c": t["a"] @ t["b"]},
            work={"_check_matmul_kernel": work, "_check_matmul_descriptor_kernel": work},
            candidates=static_checks.MATMUL_CANDIDATES,
        )
    ]


def check_attention(s: Shape) -> list[Case]:
    def case(D: int) -> Case:
        heads = s.B * s.config.channels // D
        pairs = heads * s.T * (s.T + 1) // 2

        def trips(a: Arguments) -> tuple[float, float]:
            blocks = s.T // a["BLOCK_M"]
            width = a["BLOCK_M"] // a["BLOCK_N"]
            return heads * blocks * (blocks - 1) // 2 * width, heads * blocks * width

        return Case(
            name=f"check_attention/{D}",
            module=static_checks,
            chooser="choose_check_attention",
            tensors=lambda new: {name: new(heads, s.T, D) for name in ("q", "k", "v", "out")},
            launch=static_checks.check_attention,
            reference=static_checks.check_attention_ref,
            work={"_check_attention_kernel": Work(bytes=8 * heads * s.T * D, flops=4 * pairs * D, trips=trips)},
            candidates=static_checks.ATTENTION_CANDIDATES,
        )

    return [case(64), case(128)]


OPS: dict[str, Callable[[Shape], list[Case]]] = {
    "check_matmul": check_matmul,
    "check_attention": check_attention,
}
CHECKS = ("check_matmul", "check_attention")  # not shipped: no budget is held for them

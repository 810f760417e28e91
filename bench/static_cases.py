"""The kernels as `bench.static` and `bench.tune` see them: per op a function of the shape that lists its cases.

To add an op: (1) write `def <op>(s: Shape) -> list[Case]`, a case per config in `_tuning.py`; (2) `tensors(new)` makes
what its launcher takes (`new(rows, columns)`, in the dtype under test unless told), `launch` calls the launcher's op;
(3) `work` names the kernels that config is for, with useful FLOPs, bytes moved at least, and how often the hot loop of
each runs, summed over the grid; (4) list `candidates` for the sweep, and in `judge` who proves them right, unless it is
the case of bench.cases called like the op; (5) enter the function in OPS below.
The launch itself (arguments, grid, warps) is taken from the launcher, so that what is bounded is what will run.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from xiangxin_kernels._tuning import (
    ARCHS,
    CrossEntropyConfig,
    GemmConfig,
    LayerNormConfig,
    choose_layer_norm,
)

from bench import static_checks
from bench.cases import Shape
from bench.static_attention import attention, attention_heads
from bench.static_case import Arguments, Case, Work, kernel_file
from bench.static_decode import decode_attention, decode_block, decode_head


def layer_norm(s: Shape) -> list[Case]:
    N, C, module = s.N, s.config.channels, kernel_file("layer_norm")
    rows, statistics = ("x", "y", "dout", "dresidual", "dx"), ("mean", "rstd")
    fwd, bwd = ("x", "weight", "bias", "y", "mean", "rstd"), (
        "dout", "x", "weight", "mean", "rstd", "dresidual", "dx", "partial"
    )  # fmt: skip

    def tensors(new: Callable[..., Tensor]) -> dict[str, Tensor]:
        weight = new(C)
        programs = module.choose_layer_norm(C, weight.dtype, module.arch_of(weight.device)).bwd_programs
        return (
            {name: new(N, C) for name in rows}
            | {name: new(N, dtype=torch.float32) for name in statistics}
            | {"weight": weight, "bias": new(C), "partial": new(2, programs, C, dtype=torch.float32)}
        )

    def candidates(part: str, arch: int) -> tuple[LayerNormConfig, ...]:
        chosen = choose_layer_norm(C, torch.bfloat16, arch)
        return tuple(replace(chosen, **{f"{part}_warps": warps}) for warps in (1, 2, 4, 8))

    def case(part: str, launch: Callable[[dict[str, Tensor]], None], work: Work) -> Case:
        return Case(
            name=f"layer_norm/{part}",
            module=module,
            chooser="choose_layer_norm",
            tensors=tensors,
            launch=launch,
            work={f"_layer_norm_{part}_kernel": work},
            candidates={arch: candidates(part, arch) for arch in ARCHS},
        )

    return [
        case("fwd", lambda t: module._layer_norm_fwd(*(t[n] for n in fwd), s.config.eps), Work(bytes=N * (4 * C + 8))),
        case(
            "bwd",
            lambda t: module._layer_norm_bwd(*(t[n] for n in bwd)),
            Work(bytes=N * (8 * C + 8), trips=lambda a: (N,)),
        ),
    ]


CROSS_ENTROPY_CANDIDATES = tuple(
    CrossEntropyConfig(block_v=columns, num_warps=warps)
    for columns, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16))
)


def cross_entropy(s: Shape) -> list[Case]:
    """In chunks of 2,048 rows, as linear_cross_entropy drives the kernel; in training it turns them into gradients."""
    N, V, module = min(2048, s.N), s.config.vocab, kernel_file("cross_entropy")

    def tensors(new: Callable[..., Tensor]) -> dict[str, Tensor]:
        return (
            {"z": new(N, V), "targets": new(N, dtype=torch.int64)}
            | {name: new(N, dtype=torch.float32) for name in ("peak", "total", "loss", "dloss")}
        )  # fmt: skip

    def forward(t: dict[str, Tensor]) -> None:
        module._cross_entropy_fwd(t["z"], t["targets"], t["peak"], t["total"], t["loss"], -100, 0.0, 0.0)

    def backward(t: dict[str, Tensor]) -> None:
        names = ("z", "z", "targets", "peak", "total", "dloss")
        module._cross_entropy_bwd(*(t[n] for n in names), -100, 0.0, 0.0)

    def train(t: dict[str, Tensor], label_smoothing: float) -> None:
        names = ("z", "z", "targets", "peak", "total", "loss")
        module._rows(*(t[n] for n in names), None, -100, 0.0, label_smoothing)

    def case(part: str, launch: Callable[[dict[str, Tensor]], None], moved: int) -> Case:
        return Case(
            name=f"cross_entropy/{part}",
            module=module,
            chooser="choose_cross_entropy",
            tensors=tensors,
            launch=launch,
            work={"_cross_entropy_kernel": Work(bytes=moved, trips=lambda a: (N * math.ceil(V / a["BLOCK_V"]),))},
            candidates=dict.fromkeys(ARCHS, CROSS_ENTROPY_CANDIDATES) if part in ("fwd", "bwd") else {},
        )

    return [
        case("fwd", forward, 2 * N * V),
        case("bwd", backward, 4 * N * V),
        case("train", partial(train, label_smoothing=0.0), 6 * N * V),
        case("train_smooth", partial(train, label_smoothing=0.1), 6 * N * V),
    ]


# block_m, block_n, block_k, warps, stages; on sm_90 with and without descriptors.
_GEMM_TILES = {
    80: [(128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (256, 128, 64, 8, 3),
         (128, 256, 32, 8, 4), (128, 128, 32, 4, 4)],
    90: [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (256, 128, 64, 8, 3)],
}  # fmt: skip
GEMM_CANDIDATES = {
    arch: tuple(GemmConfig(*tile, descriptors=d) for tile in tiles for d in ((True, False) if arch == 90 else (False,)))
    for arch, tiles in _GEMM_TILES.items()
}


def gemm(s: Shape) -> list[Case]:
    """The products of a layer that have something to fuse, by Triton, and the epilogues that follow cuBLAS's."""
    M, C, F, H, R = s.N, s.config.channels, s.config.mlp_hidden, s.config.heads, s.config.rotary_dim
    module = kernel_file("gemm")
    judges = {"rotary": "project_in", "bias": "linear", "gelu": "linear_gelu", "dgelu": "linear_gelu_bwd"}
    judges["residual"] = "project_out"

    def tensors(new: Callable[..., Tensor]) -> dict[str, Tensor]:
        return (
            {"y": new(M, C), "out": new(M, C), "p": new(M, 3 * C + F), "z": new(M, C + F)}
            | {"w_in": new(3 * C + F, C), "b_in": new(3 * C + F), "w_out": new(C, C + F), "b_out": new(2, C)}
            | {name: new(s.T, R // 2, dtype=torch.float32) for name in ("cos", "sin")}
            | {"h": new(M, F), "partial": new(M // 16, F, dtype=torch.float32)}
        )

    # Of each epilogue: columns of the output, K, bytes of operands and results in units of M rows, and the call.
    def arguments(epilogue: str, t: dict[str, Tensor]) -> tuple:
        y, p, z, w_in, b_in = (t[name] for name in ("y", "p", "z", "w_in", "b_in"))
        rotary = (t["cos"], t["sin"], C // H, s.T, 0)
        return {
            "rotary": (module.ROTARY, y, w_in[: 2 * C], p[:, : 2 * C], True, None, b_in[: 2 * C], None, rotary, None),
            "bias": (module.BIAS, y, w_in[:C], p[:, :C], True, None, b_in[:C], None, None, None),
            "gelu": (module.GELU, y, w_in[3 * C :], p[:, 3 * C :], True, z[:, C:], b_in[3 * C :], None, None, None),
            "dgelu": (
                module.DGELU,
                y,
                t["w_out"][:, C:],
                p[:, 3 * C :],
                False,
                z[:, C:],
                None,
                t["h"],
                None,
                t["partial"],
            ),
            "residual": (module.RESIDUAL, z, t["w_out"], t["out"], True, None, t["b_out"], y, None, None),
        }[epilogue]

    def case(epilogue: str, N: int, K: int, extra: int) -> Case:
        def tiles(a: Arguments) -> int:
            return math.ceil(M / a["BLOCK_M"]) * math.ceil(N / a["BLOCK_N"])

        work = Work(
            bytes=2 * (M * K + K * N + M * N * (1 + extra)),
            flops=2 * M * N * K,
            trips=lambda a: (tiles(a) * math.ceil(K / a["BLOCK_K"]),),
            bodies=tiles,
        )
        return Case(
            name=f"gemm/{epilogue}",
            module=module,
            chooser="choose_gemm",
            tensors=tensors,
            launch=lambda t: module._triton_gemm(*arguments(epilogue, t)),
            work={"_gemm_kernel": work, "_gemm_descriptor_kernel": work},
            candidates=GEMM_CANDIDATES,
            judge=judges[epilogue],
            replaced={"fuses_gemm": lambda *about: True},
        )

    def after_cublas(epilogue: str, N: int, accesses: float) -> Case:
        def launch(t: dict[str, Tensor]) -> None:
            kind, _, _, out, _, out2, bias, other, rotary, partial = arguments(epilogue, t)
            bias = bias if epilogue == "residual" else None
            module._elementwise(kind, out, out, out2, bias, other, rotary, partial)

        return Case(
            name=f"gemm/after_cublas_{epilogue}",
            module=module,
            chooser="choose_elementwise",
            tensors=tensors,
            launch=launch,
            work={"_epilogue_kernel": Work(bytes=int(2 * M * N * accesses))},
        )

    return [
        case("rotary", 2 * C, C, 0),
        case("bias", C, C, 0),
        case("gelu", F, C, 1),
        case("dgelu", F, C, 2),
        case("residual", C, C + F, 1),
        after_cublas("rotary", 2 * C, 2 * R * H / C),
        after_cublas("gelu", F, 2),
        after_cublas("dgelu", F, 4),
        after_cublas("residual", C, 3),
    ]


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
            work={"_check_attention_kernel": Work(bytes=8 * heads * s.T * D, flops=4 * pairs * D, trips=trips)},
            candidates=static_checks.ATTENTION_CANDIDATES,
        )

    return [case(64), case(128)]


OPS: dict[str, Callable[[Shape], list[Case]]] = {
    "layer_norm": layer_norm,
    "attention": attention,
    "attention_heads": attention_heads,
    "cross_entropy": cross_entropy,
    "gemm": gemm,
    "decode_attention": decode_attention,
    "decode_block": decode_block,
    "decode_head": decode_head,
    "check_matmul": check_matmul,
    "check_attention": check_attention,
}
CHECKS = ("check_matmul", "check_attention")  # not shipped: no budget is held for them

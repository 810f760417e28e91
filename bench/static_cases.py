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
    AttentionConfig,
    CrossEntropyConfig,
    GemmConfig,
    LayerNormConfig,
    choose_layer_norm,
)

from bench import static_checks
from bench.cases import Shape
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


def _attention_candidates(rows: dict[int, list[tuple[int, ...]]]) -> dict[int, tuple[AttentionConfig, ...]]:
    return {arch: tuple(AttentionConfig(*row) for row in configs) for arch, configs in rows.items()}


ATTENTION_CANDIDATES = {
    "fwd": _attention_candidates({
        80: [(128, 64, 4, 3, 8, 32), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 2),
             (64, 64, 4, 3),
             (64, 128, 4, 2), (128, 32, 4, 3), (128, 32, 8, 3), (128, 128, 8, 2)],
        90: [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2),
             (64, 64, 4, 3), (128, 32, 8, 3)],
    }),
    "bwd_dq": _attention_candidates({
        80: [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 32, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2)],
        90: [(128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 128, 4, 2)],
    }),
    "bwd_dkv": _attention_candidates({
        80: [(64, 64, 4, 2), (32, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 2), (32, 128, 4, 2), (64, 64, 4, 3)],
        90: [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2), (32, 128, 8, 2)],
    }),
}  # fmt: skip


def attention(s: Shape) -> list[Case]:
    """The op with rotary embedding; "block": parallel_block's backward, which rotates pairs back and sums columns;
    "packed": forward and backward of the block with documents, as long as the sequence where work is counted."""
    B, T, H, D, R = s.B, s.T, s.config.heads, s.config.head_dim, s.config.rotary_dim
    module, scale = kernel_file("attention"), s.config.head_dim**-0.5
    rows = ("q", "k", "v", "out", "copy", "dout", "dq", "dk", "dv")
    pairs, tensor_bytes = B * H * T * (T + 1) // 2, 2 * B * T * H * D

    def tensors(new: Callable[..., Tensor]) -> dict[str, Tensor]:
        return (
            {name: new(B, T, H, D) for name in rows}
            | {name: new(B, H, T, dtype=torch.float32) for name in ("lse", "delta")}
            | {name: new(T, R // 2, dtype=torch.float32) for name in ("cos", "sin")}
            | {"dq_sums": new(B * T // 16, H, D, dtype=torch.float32)}
            | {"dkv_sums": new(2, B * T // 16, H, D, dtype=torch.float32)}
            | {"bounds": new(2, B, T, dtype=torch.int32)}
        )

    def forward(t: dict[str, Tensor], variant: str) -> None:
        bounds = t["bounds"] if variant == "packed_" else None
        module._attention_fwd(t["q"], t["k"], t["v"], None, None, bounds, t["out"], t["copy"], t["lse"], scale, 0)

    def backward(t: dict[str, Tensor], variant: str) -> None:
        names = ("q", "k", "v", "out", "dout", "lse", "cos", "sin")
        bounds = t["bounds"] if variant == "packed_" else None
        written = [t[name] for name in ("dq", "dk", "dv", "delta")]
        sums = (t["dq_sums"], t["dkv_sums"]) if variant else (None, None)
        module._attention_bwd(*(t[n] for n in names), bounds, *written, *sums, scale, bool(variant))

    def by_query_tile(a: Arguments) -> tuple[int, int]:
        full = [(start + 1) // a["BLOCK_N"] for start in range(0, T, a["BLOCK_M"])]
        ends = [min(start + a["BLOCK_M"], T) for start in range(0, T, a["BLOCK_M"])]
        keys = [end - n * a["BLOCK_N"] for end, n in zip(ends, full, strict=True)]
        diagonal = sum(math.ceil(n / a.get("DIAGONAL_N", a["BLOCK_N"])) for n in keys)
        return B * H * sum(full), B * H * diagonal

    def by_key_tile(a: Arguments) -> tuple[int, int]:
        diagonal = full = 0
        for start in range(0, T, a["BLOCK_N"]):
            end = min(math.ceil((start + a["BLOCK_N"] - 1) / a["BLOCK_M"]), math.ceil(T / a["BLOCK_M"]))
            diagonal += end - start // a["BLOCK_M"]
            full += math.ceil(T / a["BLOCK_M"]) - end
        return B * H * diagonal, B * H * full

    def case(variant: str, part: str, launch: Callable, products: int, moved: int, trips: Callable) -> Case:
        def loops(a: Arguments) -> tuple[int, ...]:
            if not a["DOCUMENTS"]:
                return trips(a)
            return (*trips(a), 0) if part == "bwd_dkv" else (0, *trips(a))

        return Case(
            name=f"attention/{variant}{part}",
            module=module,
            chooser="choose_attention",
            tensors=tensors,
            launch=partial(launch, variant=variant),
            work={
                f"_attention_{part}_kernel": Work(
                    bytes=moved * tensor_bytes, flops=2 * products * pairs * D, trips=loops
                )
            },
            candidates={} if variant else ATTENTION_CANDIDATES[part],
        )

    return [
        case(variant, *about)
        for about in (
            ("fwd", forward, 2, 5, by_query_tile),
            ("bwd_dq", backward, 3, 6, by_query_tile),
            ("bwd_dkv", backward, 4, 6, by_key_tile),
        )
        for variant in ("", "block_", "packed_")
        if (variant, about[0]) != ("block_", "fwd")
    ]


CROSS_ENTROPY_CANDIDATES = tuple(
    CrossEntropyConfig(block_v=columns, num_warps=warps)
    for columns, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16))
)


def cross_entropy(s: Shape) -> list[Case]:
    """In chunks of 2,048 rows, as linear_cross_entropy drives the kernel."""
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

    def case(part: str, launch: Callable[[dict[str, Tensor]], None], moved: int) -> Case:
        return Case(
            name=f"cross_entropy/{part}",
            module=module,
            chooser="choose_cross_entropy",
            tensors=tensors,
            launch=launch,
            work={"_cross_entropy_kernel": Work(bytes=moved, trips=lambda a: (N * math.ceil(V / a["BLOCK_V"]),))},
            candidates=dict.fromkeys(ARCHS, CROSS_ENTROPY_CANDIDATES),
        )

    return [case("fwd", forward, 2 * N * V), case("bwd", backward, 4 * N * V)]


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
    "cross_entropy": cross_entropy,
    "gemm": gemm,
    "decode_attention": decode_attention,
    "decode_block": decode_block,
    "decode_head": decode_head,
    "check_matmul": check_matmul,
    "check_attention": check_attention,
}
CHECKS = ("check_matmul", "check_attention")  # not shipped: no budget is held for them

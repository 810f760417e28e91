"""Attention's kernels as `bench.static` and `bench.tune` see them.

fwd           as the parallel block calls it: q and k rotated already, out and a copy of it
rotary_fwd    as `attention` does, with cos and sin, and the rotation of k that it needs
bwd_*         as `attention` does, with cos and sin
block_bwd_*   as the parallel block does: rotates neighbouring pairs back and sums columns
odd_bwd_*     bwd_* where no tile divides T
packed_*      the block's with documents, as long as the sequence where work is counted
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from xiangxin_kernels._tuning import AttentionConfig

from bench.cases import Shape
from bench.static_case import Arguments, Case, Work, kernel_file


def _candidates(rows: dict[int, list[tuple[int, ...]]]) -> dict[int, tuple[AttentionConfig, ...]]:
    return {arch: tuple(AttentionConfig(*row) for row in configs) for arch, configs in rows.items()}


CANDIDATES = {
    "fwd": _candidates({
        80: [(128, 64, 4, 3, 8, 32), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 2),
             (64, 64, 4, 3),
             (64, 128, 4, 2), (128, 32, 4, 3), (128, 32, 8, 3), (128, 128, 8, 2)],
        90: [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2),
             (64, 64, 4, 3), (128, 32, 8, 3)],
    }),
    "bwd_dq": _candidates({
        80: [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 32, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2)],
        90: [(128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 128, 4, 2)],
    }),
    "bwd_dkv": _candidates({
        80: [(64, 64, 4, 2), (32, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 2), (32, 128, 4, 2), (64, 64, 4, 3)],
        90: [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2), (32, 128, 8, 2)],
    }),
}  # fmt: skip
BLOCK = ("block_", "packed_")
OTHER_HEADS = (64, 96, 128)
VARIANTS = {
    "fwd": ("", "rotary_", "packed_"),
    "bwd_dq": ("", "block_", "packed_"),
    "bwd_dkv": ("", "block_", "packed_"),
}


def _cases(prefix: str, B: int, T: int, H: int, D: int, R: int, variants: dict[str, tuple[str, ...]]) -> list[Case]:
    """The variants of heads of D columns. Of those the op turns R, the block Phi's 32."""
    module, scale = kernel_file("attention"), D**-0.5
    rows = ("q", "k", "v", "out", "copy", "dout", "dq", "dk", "dv")
    pairs, tensor_bytes = B * H * T * (T + 1) // 2, 2 * B * T * H * D

    def tensors(new: Callable[..., Tensor], variant: str) -> dict[str, Tensor]:
        half = (32 if variant in BLOCK else R) // 2
        return (
            {name: new(B, T, H, D) for name in rows}
            | {name: new(B, H, T, dtype=torch.float32) for name in ("lse", "delta")}
            | {name: new(T, half, dtype=torch.float32) for name in ("cos", "sin")}
            | {"dq_sums": new(B * T // 16, H, D, dtype=torch.float32)}
            | {"dkv_sums": new(2, B * T // 16, H, D, dtype=torch.float32)}
            | {"bounds": new(2, B, T, dtype=torch.int32)}
        )

    def forward(t: dict[str, Tensor], variant: str) -> None:
        bounds = t["bounds"] if variant == "packed_" else None
        angles, copy = ((t["cos"], t["sin"]), None) if variant == "rotary_" else ((None, None), t["copy"])
        module._attention_fwd(t["q"], t["k"], t["v"], *angles, bounds, t["out"], copy, t["lse"], scale, 0)
        if variant == "rotary_":
            module._attention_rotate(t["k"], *angles, t["dk"])

    def backward(t: dict[str, Tensor], variant: str) -> None:
        names = ("q", "k", "v", "out", "dout", "lse", "cos", "sin")
        bounds = t["bounds"] if variant == "packed_" else None
        written = [t[name] for name in ("dq", "dk", "dv", "delta")]
        sums = (t["dq_sums"], t["dkv_sums"]) if variant in BLOCK else (None, None)
        module._attention_bwd(*(t[n] for n in names), bounds, *written, *sums, scale, variant in BLOCK)

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

    def loops(a: Arguments, part: str) -> tuple[int, ...]:
        trips = (by_key_tile if part == "bwd_dkv" else by_query_tile)(a)
        if part == "bwd_dkv":
            return trips if a["EVEN_T"] and not a["DOCUMENTS"] else (*trips, 0)
        return (0, *trips) if a["DOCUMENTS"] else trips

    def case(variant: str, part: str, launch: Callable, products: int, moved: int) -> Case:
        work = Work(moved * tensor_bytes, 2 * products * pairs * D, partial(loops, part=part))
        rotation = {"_attention_rotate_kernel": Work(2 * tensor_bytes)} if variant == "rotary_" else {}
        return Case(
            name=f"{prefix}{variant}{part}",
            module=module,
            chooser="choose_attention",
            tensors=partial(tensors, variant=variant),
            launch=partial(launch, variant=variant),
            work={f"_attention_{part}_kernel": work} | rotation,
            candidates={} if variant or D != 80 else CANDIDATES[part],
        )

    parts = {"fwd": (forward, 2, 5), "bwd_dq": (backward, 3, 6), "bwd_dkv": (backward, 4, 6)}
    return [case(variant, part, *parts[part]) for part, names in variants.items() for variant in names]


def attention(s: Shape) -> list[Case]:
    """Phi's heads of 80."""
    odd = _cases("attention/odd_", s.B, s.T - 1, s.config.heads, 80, s.config.rotary_dim, {"bwd_dkv": ("",)})
    return _cases("attention/", s.B, s.T, s.config.heads, 80, s.config.rotary_dim, VARIANTS) + odd


def attention_heads(s: Shape) -> list[Case]:
    """Heads of other dims, phi-1's 64 among them. Where all columns rotate, partners lie furthest apart."""
    return [
        case
        for D in OTHER_HEADS
        for case in _cases(f"attention_heads/{D}_", s.B, s.T, s.config.channels // D, D, D, VARIANTS)
    ]

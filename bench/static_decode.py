"""Decode's kernels as `bench.static` and `bench.tune` see them: each bucket of rows, each kind of weight.

A launch reads its weights once, whatever its rows; a cache of 1024 positions stands for all lengths.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from xiangxin_kernels._tuning import ARCHS, choose_decode
from xiangxin_kernels.quantized import QuantizedWeight

from bench.cases import Shape
from bench.static_case import Case, Work, kernel_file

CACHE = 1024
GROUP = 64
# Rows and bits of a weight; quantized weights with as many rows as one costs, and with the most.
VARIANTS = ((8, 16), (32, 16), (8, 8), (32, 8), (8, 4), (32, 4))


def _bytes(N: int, K: int, bits: int) -> int:
    """Of a weight [N, K] and its scale."""
    return N * K * bits // 8 + {16: 0, 8: 2 * N, 4: 2 * N * K // GROUP}[bits]


def _weight(new: Callable[..., Tensor], N: int, K: int, bits: int) -> tuple[Tensor, Tensor | None]:
    if bits == 16:
        return new(N, K), None
    if bits == 8:
        return QuantizedWeight(new(N, K, dtype=torch.int8), new(N))
    return QuantizedWeight(new(N, K // 2, dtype=torch.uint8), new(N, K // GROUP))


def _cases(op: str, kernel: str, tensors: Callable, launch: Callable, moved: Callable[[int, int], int]) -> list[Case]:
    """`tensors(new, B, bits)`, `launch(t)` and the bytes `moved(B, bits)` of one kernel, as a case for each variant."""
    module = kernel_file("decode")

    def case(B: int, bits: int) -> Case:
        chosen = {arch: choose_decode(B, bits, arch) for arch in ARCHS}
        return Case(
            name=f"{op}/{kernel}_{B}" + ("" if bits == 16 else f"_int{bits}"),
            module=module,
            chooser="choose_decode",
            tensors=lambda new: tensors(new, B, bits),
            launch=launch,
            work={f"_decode_{kernel}_kernel": Work(bytes=moved(B, bits))},
            candidates={
                arch: tuple(replace(chosen[arch], block_n=block_n) for block_n in (16, 32, 64)) for arch in ARCHS
            },
        )

    return [case(B, bits) for B, bits in VARIANTS]


def decode_block(s: Shape) -> list[Case]:
    """The products before and after attention."""
    C, F, H, R, module = (
        s.config.channels,
        s.config.mlp_hidden,
        s.config.heads,
        s.config.rotary_dim,
        kernel_file("decode"),
    )
    N, K = 3 * C + F, C + F

    def tensors_in(new: Callable[..., Tensor], B: int, bits: int) -> dict[str, Tensor]:
        w_in, scale = _weight(new, N, C, bits)
        return (
            {"x": new(B, C), "ln_w": new(C), "ln_b": new(C), "w_in": w_in, "scale": scale, "b_in": new(N)}
            | {name: new(CACHE, R // 2, dtype=torch.float32) for name in ("cos", "sin")}
            | {name: new(B, dtype=torch.int64) for name in ("positions", "slots")}
            | {"q": new(B, C), "k": new(B, CACHE, H, C // H), "v": new(B, CACHE, H, C // H), "z": new(B, K)}
            | {"counters": new(B * H + C // 16, dtype=torch.int32)}
        )

    def tensors_out(new: Callable[..., Tensor], B: int, bits: int) -> dict[str, Tensor]:
        w_out, scale = _weight(new, C, K, bits)
        partial = new(K // C, B, C, dtype=torch.float32)
        return {
            "z": new(B, K),
            "w_out": w_out,
            "scale": scale,
            "b_out": new(2, C),
            "x": new(B, C),
            "out": new(B, C),
        } | {"partial": partial, "counters": new(C // 16, dtype=torch.int32)}

    norm = Case(
        name="decode_block/norm",
        module=module,
        chooser="choose_decode",
        tensors=lambda new: {"x": new(32, C), "ln_w": new(C), "ln_b": new(C), "y": new(32, C)},
        launch=lambda t: module._decode_norm(*t.values(), s.config.eps),
        work={"_decode_norm_kernel": Work(bytes=2 * 64 * C)},
    )
    return (
        [norm]
        + _cases(
            "decode_block",
            "project_in",
            tensors_in,
            lambda t: module._decode_project_in(*t.values(), H, s.config.eps),
            lambda B, bits: _bytes(N, C, bits) + 2 * B * (C + N),
        )
        + _cases(
            "decode_block",
            "project_out",
            tensors_out,
            lambda t: module._decode_project_out(*t.values()),
            lambda B, bits: _bytes(C, K, bits) + 2 * B * (K + 2 * C),
        )
    )


def decode_head(s: Shape) -> list[Case]:
    C, V, module = s.config.channels, s.config.vocab, kernel_file("decode")

    def tensors(new: Callable[..., Tensor], B: int, bits: int) -> dict[str, Tensor]:
        head_w, scale = _weight(new, V, C, bits)
        logits = new(B, V, dtype=torch.float32)
        norm = {"x": new(B, C), "ln_w": new(C), "ln_b": new(C)}
        return norm | {"head_w": head_w, "scale": scale, "head_b": new(V), "logits": logits}

    return _cases(
        "decode_head",
        "head",
        tensors,
        lambda t: module._decode_head(*t.values(), s.config.eps),
        lambda B, bits: _bytes(V, C, bits) + B * (2 * C + 4 * V),
    )


def decode_attention(s: Shape) -> list[Case]:
    H, D, module = s.config.heads, s.config.head_dim, kernel_file("decode")

    def tensors(new: Callable[..., Tensor]) -> dict[str, Tensor]:
        splits = CACHE // module.choose_decode_attention(ARCHS[0]).split
        return (
            {"q": new(1, H, D), "k": new(1, CACHE, H, D), "v": new(1, CACHE, H, D)}
            | {name: new(1, dtype=torch.int64) for name in ("lengths", "slots")}
            | {"out": new(1, H, D), "partial": new(1, H, splits, D + 2, dtype=torch.float32)}
            | {"counters": new(H, dtype=torch.int32)}
        )

    return [
        Case(
            name="decode_attention/step",
            module=module,
            chooser="choose_decode_attention",
            tensors=tensors,
            launch=lambda t: module._decode_attention(*t.values(), D**-0.5, 1),
            work={"_decode_attention_kernel": Work(bytes=4 * CACHE * H * D)},
        )
    ]

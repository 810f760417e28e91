"""Launch configs: per op one frozen dataclass of constexprs and launch sizes, its rows, and a pure `choose_<op>`.

    choose_<op>(shape..., dtype, arch) -> <Op>Config        asks no device, times nothing: same arguments, same config

Rows are keyed by architecture: 80 (A100, A800) or 90 (H100, H800, H200). `python -m bench.tune` measures candidates on
a GPU and prints rows to paste here; `python -m bench.static` compiles them without one. A comment at each row says
where it comes from: "measured <device>, torch, triton, date", or "static" (picked by bench.static, not yet measured).
"""

import functools
from dataclasses import dataclass

import torch

ARCHS = (80, 90)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def arch_of(device: torch.device) -> int:
    """The architecture whose rows serve `device`: 90 from compute capability 9.0 on, 80 below it and off CUDA."""
    return 90 if device.type == "cuda" and _capability(device) >= (9, 0) else 80


@dataclass(frozen=True)
class CrossEntropyConfig:
    """One program a row of logits, BLOCK_V columns at a time."""

    block_v: int
    num_warps: int


def choose_cross_entropy(V: int, dtype: torch.dtype, arch: int) -> CrossEntropyConfig:
    """Static: 16 columns a thread keep two 128-bit loads in flight; a short row takes one block."""
    return CrossEntropyConfig(block_v=min(4096, max(16, 1 << (V - 1).bit_length())), num_warps=8 if V > 1024 else 4)


@dataclass(frozen=True)
class LayerNormConfig:
    """A row is one block of columns; bwd_programs share the backward's rows."""

    block_c: int
    fwd_warps: int
    bwd_warps: int
    bwd_programs: int


def choose_layer_norm(C: int, dtype: torch.dtype, arch: int) -> LayerNormConfig:
    """Static: C is known to the compiler, which drops the lanes past it in steps of 256 columns a warp."""
    block_c = 1 << (C - 1).bit_length()
    fwd_warps = min(16, max(1, block_c // 2048))
    return LayerNormConfig(block_c, fwd_warps, min(16, 2 * fwd_warps), {80: 4 * 108, 90: 4 * 132}[arch])


@dataclass(frozen=True)
class AttentionConfig:
    """BLOCK_M queries by BLOCK_N keys; the tiles of `heads_per_group` heads are scheduled together, longest first.

    diagonal_n: keys of the forward's tiles on the diagonal, whose masks cost registers; 0 is block_n.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    heads_per_group: int = 8
    diagonal_n: int = 0


# static, D = 80 (kernels/README.md has the candidates): on sm_80 shared memory limits tiles of 16 rows a warp
_ATTENTION = {
    ("fwd", 80): AttentionConfig(block_m=128, block_n=64, num_warps=4, num_stages=3, diagonal_n=32),
    ("bwd_dq", 80): AttentionConfig(block_m=128, block_n=32, num_warps=4, num_stages=2),
    ("bwd_dkv", 80): AttentionConfig(block_m=32, block_n=64, num_warps=4, num_stages=2),
    ("fwd", 90): AttentionConfig(block_m=128, block_n=128, num_warps=8, num_stages=2),
    ("bwd_dq", 90): AttentionConfig(block_m=128, block_n=128, num_warps=8, num_stages=2),
    ("bwd_dkv", 90): AttentionConfig(block_m=64, block_n=128, num_warps=8, num_stages=2),
}
# static: heads of other dims, tiles whose loops spill in none of the variants of bench.static_attention
_ATTENTION_64 = _ATTENTION | {
    ("fwd", 80): AttentionConfig(block_m=128, block_n=32, num_warps=4, num_stages=2),
}
_ATTENTION_96 = {
    ("fwd", 80): AttentionConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, diagonal_n=32),
    ("bwd_dq", 80): AttentionConfig(block_m=128, block_n=32, num_warps=8, num_stages=2),
    ("bwd_dkv", 80): AttentionConfig(block_m=32, block_n=128, num_warps=8, num_stages=3),
    ("fwd", 90): AttentionConfig(block_m=128, block_n=128, num_warps=8, num_stages=2),
    ("bwd_dq", 90): AttentionConfig(block_m=128, block_n=64, num_warps=8, num_stages=2),
    ("bwd_dkv", 90): AttentionConfig(block_m=64, block_n=128, num_warps=8, num_stages=2),
}
_ATTENTION_128 = _ATTENTION_96 | {
    ("bwd_dkv", 80): AttentionConfig(block_m=16, block_n=128, num_warps=8, num_stages=1),
    ("bwd_dkv", 90): AttentionConfig(block_m=64, block_n=128, num_warps=8, num_stages=3),
}
# fp32 products run on the FMA pipes, where small tiles keep the accumulators in registers.
_ATTENTION_FP32 = AttentionConfig(block_m=16, block_n=32, num_warps=4, num_stages=2)
_ATTENTION_128_FP32 = AttentionConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)


def choose_attention(kernel: str, D: int, dtype: torch.dtype, arch: int) -> AttentionConfig:
    """`kernel` is "fwd", "bwd_dq" or "bwd_dkv"."""
    if dtype == torch.float32:
        return _ATTENTION_FP32 if D <= 96 else _ATTENTION_128_FP32
    if D <= 64:
        return _ATTENTION_64[kernel, arch]
    return {80: _ATTENTION, 96: _ATTENTION_96, 128: _ATTENTION_128}[D][kernel, arch]


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of a Triton GEMM; `descriptors`: persistent, operands by bulk copies."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    descriptors: bool = False


@dataclass(frozen=True)
class ElementwiseConfig:
    """Tiles of the epilogues that follow a cuBLAS product."""

    block_m: int
    block_n: int
    num_warps: int


# Epilogues and architectures where the Triton GEMM was measured to beat cuBLAS and one elementwise kernel.
_FUSED_IS_FASTER: frozenset[tuple[str, int]] = frozenset()

# static: free of spills in the loop, the best bound of bench.static's candidates; "dgelu" spills at 128 x 256.
_GEMM = {
    80: GemmConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4),
    90: GemmConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, descriptors=True),
}
_GEMM_DGELU = {
    80: GemmConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    90: GemmConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, descriptors=True),
}
# fp32 products run on the FMA pipes, where small tiles keep the accumulators in registers. `fuses_gemm` leaves fp32 to
# cuBLAS; this row serves bench, which holds both ways against each other in every dtype.
_GEMM_FP32 = GemmConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=2)


def fuses_gemm(epilogue: str, N: int, K: int, dtype: torch.dtype, arch: int) -> bool:
    """Whether the Triton GEMM does the product before "rotary", "gelu", "dgelu" or "residual", or cuBLAS does.

    Rows of K or N columns that do not start on 16 bytes are cuBLAS's: read one by one they spill in the Triton loop.
    """
    return dtype != torch.float32 and N % 8 == K % 8 == 0 and (epilogue, arch) in _FUSED_IS_FASTER


def choose_gemm(epilogue: str, dtype: torch.dtype, arch: int) -> GemmConfig:
    """The tiles of the Triton GEMM with that epilogue ("bias" too)."""
    if dtype == torch.float32:
        return _GEMM_FP32
    return (_GEMM_DGELU if epilogue == "dgelu" else _GEMM)[arch]


def choose_elementwise(epilogue: str, arch: int) -> ElementwiseConfig:
    """Static: two 16-byte accesses a thread and operand; the column sums of "dgelu" want tall tiles."""
    return ElementwiseConfig(block_m=64 if epilogue == "dgelu" else 16, block_n=128, num_warps=4)


# Of decode's products and their LayerNorm. Not tuned: a row's bits depend on it, and it makes the slices of a step the
# warps' own.
DECODE_WARPS = 4


@dataclass(frozen=True)
class DecodeConfig:
    """A matrix-vector product of decode: BLOCK_N rows of the weight a program, up to `rows` rows of x.

    norm: each program normalises x itself; else a launch before does.
    """

    rows: int
    block_n: int
    norm: bool


def choose_decode(B: int, bits: int, arch: int) -> DecodeConfig:
    """Static: the programs of a Phi layer fit the SMs at once, or nearly. No number here enters the bits of a row.

    Weights of 4 bits are read sooner than a program could normalise 8 rows.
    """
    if B <= 8:
        return DecodeConfig(rows=8, block_n=32, norm=bits != 4)
    return DecodeConfig(rows=32, block_n=32, norm=False)


@dataclass(frozen=True)
class DecodeAttentionConfig:
    """Positions of the cache a program attends to, which the rows' bits depend on."""

    split: int
    num_warps: int


def choose_decode_attention(arch: int) -> DecodeAttentionConfig:
    """Static: 20 KB of keys and values a program, all under way at once."""
    return DecodeAttentionConfig(split=64, num_warps=4)

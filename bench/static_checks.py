"""Two kernels of our own whose speed is publicly known in other hands: a GEMM and causal attention, in plain Triton.

Nothing ships with them. `bench.static` bounds them so that its model can be held against published figures
(see its docstring); whoever changes the model reads there how far it may be trusted.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from xiangxin_kernels._tuning import arch_of


@dataclass(frozen=True)
class CheckMatmulConfig:
    """`descriptors`: the persistent kernel with bulk copies, for sm_90 only."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


@dataclass(frozen=True)
class CheckAttentionConfig:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_check_matmul(arch: int) -> CheckMatmulConfig:
    return CheckMatmulConfig(128, 256, 64, num_warps=8, num_stages=3, descriptors=arch >= 90)


def choose_check_attention(D: int, arch: int) -> CheckAttentionConfig:
    return CheckAttentionConfig(128, 64, num_warps=8 if arch >= 90 or D > 64 else 4, num_stages=3)


MATMUL_CANDIDATES = {
    80: tuple(
        CheckMatmulConfig(*row)
        for row in ((128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 32, 4, 4), (128, 64, 32, 4, 4),
                    (64, 64, 32, 4, 4), (256, 256, 32, 8, 3))
    ),
    90: tuple(
        CheckMatmulConfig(*row)
        for row in ((128, 256, 64, 8, 3, True), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4, True),
                    (128, 128, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4))
    ),
}  # fmt: skip
ATTENTION_CANDIDATES = {
    80: tuple(
        CheckAttentionConfig(*row) for row in ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 4, 3))
    ),
    90: tuple(
        CheckAttentionConfig(*row) for row in ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3))
    ),
}


@triton.jit
def _check_matmul_kernel(
    a_ptr, b_ptr, c_ptr,
    M, N, K,
    a_stride_m, b_stride_k, c_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] b [K, N]; the sizes are multiples of the tiles."""
    pid, tiles_m, tiles_n = tl.program_id(0), M // BLOCK_M, N // BLOCK_N
    group = pid // (GROUP_M * tiles_n)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)
    offs_m = (group * GROUP_M + pid % (GROUP_M * tiles_n) % rows).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % (GROUP_M * tiles_n) // rows) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * a_stride_m + offs_k[None, :]
    b_ptrs = b_ptr + offs_k[:, None] * b_stride_k + offs_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * b_stride_k
    tl.store(c_ptr + offs_m[:, None] * c_stride_m + offs_n[None, :], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def _check_matmul_descriptor_kernel(
    a_ptr, b_ptr, c_ptr,
    M, N, K,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The same for contiguous operands, b as [N, K]: persistent, every access a bulk copy."""
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    tiles_m, tiles_n = M // BLOCK_M, N // BLOCK_N
    for tile in range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        group = tile // (GROUP_M * tiles_n)
        rows = min(tiles_m - group * GROUP_M, GROUP_M)
        start_m = (group * GROUP_M + tile % (GROUP_M * tiles_n) % rows) * BLOCK_M
        start_n = tile % (GROUP_M * tiles_n) // rows * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(a.load([start_m, k]), b.load([start_n, k]).T, acc, input_precision="ieee")
        c.store([start_m, start_n], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def _check_attention_kv_loop(
    acc, l_i, m_i, q, k_ptrs, v_ptrs, offs_m, start, end, stride_t, qk_scale,
    BLOCK_N: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    for start_n in range(start, end, BLOCK_N):
        scores = tl.dot(q, tl.load(k_ptrs + start_n.to(tl.int64) * stride_t), input_precision="ieee")
        if DIAGONAL:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            scores = tl.where(offs_m[:, None] >= offs_n[None, :], scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1) * qk_scale)
        p = tl.math.exp2(scores * qk_scale - m_new[:, None])
        alpha = tl.math.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(v_ptrs + start_n.to(tl.int64) * stride_t)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def _check_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    T, stride_h, stride_t, qk_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Causal attention over [heads, T, D], T a multiple of the tiles; qk_scale includes log2(e)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    base = tl.program_id(1).to(tl.int64) * stride_h
    q_offsets = base + offs_m[:, None].to(tl.int64) * stride_t + offs_d[None, :]
    q = tl.load(q_ptr + q_offsets)
    k_ptrs = k_ptr + base + offs_n[None, :] * stride_t + offs_d[:, None]
    v_ptrs = v_ptr + base + offs_n[:, None] * stride_t + offs_d[None, :]
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    diagonal = tl.program_id(0) * BLOCK_M
    acc, l_i, m_i = _check_attention_kv_loop(
        acc, l_i, m_i, q, k_ptrs, v_ptrs, offs_m, 0, diagonal, stride_t, qk_scale, BLOCK_N, False
    )
    acc, l_i, m_i = _check_attention_kv_loop(
        acc, l_i, m_i, q, k_ptrs, v_ptrs, offs_m, diagonal, diagonal + BLOCK_M, stride_t, qk_scale, BLOCK_N, True
    )
    tl.store(out_ptr + q_offsets, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty))


def check_matmul(t: dict[str, Tensor]) -> None:
    """c = a b for a [M, K], b [K, N] (b_t is its transpose, which the descriptors read)."""
    (M, K), N = t["a"].shape, t["c"].shape[1]
    cfg = choose_check_matmul(arch_of(t["a"].device))
    tiles = M // cfg.block_m * (N // cfg.block_n)
    blocks = {"BLOCK_M": cfg.block_m, "BLOCK_N": cfg.block_n, "BLOCK_K": cfg.block_k, "GROUP_M": 8}
    sizes = {"num_warps": cfg.num_warps, "num_stages": cfg.num_stages}
    if cfg.descriptors:
        programs = min(tiles, 132)
        _check_matmul_descriptor_kernel[(programs,)](
            t["a"], t["b_t"], t["c"], M, N, K, PROGRAMS=programs, **blocks, **sizes
        )
    else:
        strides = (t["a"].stride(0), t["b"].stride(0), t["c"].stride(0))
        _check_matmul_kernel[(tiles,)](t["a"], t["b"], t["c"], M, N, K, *strides, **blocks, **sizes)


def check_attention(t: dict[str, Tensor]) -> None:
    """Causal attention of q, k, v [heads, T, D] into out."""
    heads, T, D = t["q"].shape
    cfg = choose_check_attention(D, arch_of(t["q"].device))
    _check_attention_kernel[(T // cfg.block_m, heads)](
        t["q"], t["k"], t["v"], t["out"], T, t["q"].stride(0), t["q"].stride(1), D**-0.5 * math.log2(math.e),
        D=D, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, num_warps=cfg.num_warps, num_stages=cfg.num_stages,
    )  # fmt: skip

"""GEMM with fused epilogues: the products of a Phi layer that have something to fuse.

    t = a b^T (or a b)                                     fp32 accumulation over K in ascending order, never split
    BIAS      out = t + bias
    ROTARY    out = rotate(t + bias)                       pairs of neighbours in the first R of every D columns
    GELU      out = t + bias,   out2 = gelu(out)
    DGELU     out = t gelu'(h), out2 = gelu(h)             and column sums of out over each tile of rows
    RESIDUAL  out = residual + t + bias[0] + bias[1]

Shapes    a [M, K]   b [N, K], or [K, N] for DGELU   out, out2, h, residual [M, N]   bias [N] ([2, N] for RESIDUAL)
          cos, sin [>= positions, R/2] fp32: row m of a stands at position q_start + m mod T
          partial [row tiles, N] fp32: the column sums
Method    Two ways behind each op, of which `fuses_gemm` knows the faster: one Triton GEMM whose epilogue works on the
          accumulator, or cuBLAS and one elementwise kernel with the same epilogue on what cuBLAS wrote. On sm_90 the
          Triton GEMM is persistent and loads through tensor descriptors, on sm_80 through pipelined pointers.
Numerics  epilogues in fp32; the first way rounds once, the second rounds t to the dtype in between, as plain torch
          does. In the first a row's bits do not depend on how many rows there are; cuBLAS promises no such thing
Limits    a, b, out of one dtype out of fp32, fp16, bf16; last axes contiguous, row strides free; bias contiguous; D, R
          even. Rows that do not start on 16 bytes (K or N no multiple of 8) go the second way
Source    the GELU of mlp.py, the rotary embedding of attention.py
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import gelu, gelu_and_grad, grouped_tile, rotate_pairs
from ._host import kernel_op
from ._tuning import arch_of, choose_elementwise, choose_gemm, fuses_gemm

BIAS = tl.constexpr(0)
ROTARY = tl.constexpr(1)
GELU = tl.constexpr(2)
DGELU = tl.constexpr(3)
RESIDUAL = tl.constexpr(4)
EPILOGUES = ("bias", "rotary", "gelu", "dgelu", "residual")


@triton.jit
def _epilogue(
    t, offs_m, offs_n, mask, tile_m, out_ptr, out2_ptr, bias_ptr, other_ptr, cos_ptr, sin_ptr, partial_ptr,
    out_stride_m, out2_stride_m, other_stride_m, N, T, q_start,
    EPILOGUE: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """What becomes of one tile t [BLOCK_M, BLOCK_N] fp32 of the product; `other` is h or the residual."""
    row = offs_m.to(tl.int64)[:, None]
    mask_n = offs_n < N
    out_ptrs = out_ptr + row * out_stride_m + offs_n[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if bias_ptr is not None:
        t += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == RESIDUAL:
        t += tl.load(bias_ptr + N + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        t += tl.load(other_ptr + row * other_stride_m + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if EPILOGUE == ROTARY:
        t = rotate_pairs(t, q_start + offs_m % T, offs_n, cos_ptr, sin_ptr, 1, D, R)
    if EPILOGUE == GELU:
        # Of h as it is saved, so that the backward's derivative is that of this very function.
        value = gelu(t.to(dtype).to(tl.float32))
        tl.store(out2_ptr + row * out2_stride_m + offs_n[None, :], value.to(dtype), mask=mask)
    if EPILOGUE == DGELU:
        h = tl.load(other_ptr + row * other_stride_m + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        value, slope = gelu_and_grad(h)
        t *= slope
        tl.store(out2_ptr + row * out2_stride_m + offs_n[None, :], value.to(dtype), mask=mask)
        sums = tl.sum(tl.where(mask, t, 0.0), 0)
        tl.store(partial_ptr + tile_m.to(tl.int64) * N + offs_n, sums, mask=mask_n)
    tl.store(out_ptrs, t.to(dtype), mask=mask)


@triton.jit
def _gemm_kernel(
    a_ptr, b_ptr, out_ptr, out2_ptr, bias_ptr, other_ptr, cos_ptr, sin_ptr, partial_ptr,
    a_stride_m, b_stride, out_stride_m, out2_stride_m, other_stride_m, M, N, K, T, q_start,
    EPILOGUE: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    B_TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile a program. B_TRANSPOSED: b is [N, K], as nn.Linear holds weights; otherwise [K, N]."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end are read as the last one, which costs no mask in the loop, and never stored.
    a_ptrs = a_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[:, None] * a_stride_m + offs_k[None, :]
    if B_TRANSPOSED:
        b_ptrs = b_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[None, :] * b_stride + offs_k[:, None]
        b_step = BLOCK_K
    else:
        b_ptrs = b_ptr + offs_k.to(tl.int64)[:, None] * b_stride + offs_n[None, :]
        b_step = BLOCK_K * b_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        if EVEN_K:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=mask_k[None, :], other=0.0)
        if B_TRANSPOSED:
            if EVEN_K:
                b = tl.load(b_ptrs)
            else:
                b = tl.load(b_ptrs, mask=mask_k[:, None], other=0.0)
        else:
            b = tl.load(b_ptrs, mask=mask_k[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += b_step
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    _epilogue(
        acc, offs_m, offs_n, mask, tile_m, out_ptr, out2_ptr, bias_ptr, other_ptr, cos_ptr, sin_ptr, partial_ptr,
        out_stride_m, out2_stride_m, other_stride_m, N, T, q_start, EPILOGUE, D, R,
    )  # fmt: skip


@triton.jit
def _gemm_descriptor_kernel(
    a_ptr, b_ptr, out_ptr, out2_ptr, bias_ptr, other_ptr, cos_ptr, sin_ptr, partial_ptr,
    a_stride_m, b_stride, out_stride_m, out2_stride_m, other_stride_m, M, N, K, T, q_start,
    EPILOGUE: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    B_TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Persistent: a program takes every num_programs-th tile; operands arrive by bulk copies, zeros past their ends."""
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [a_stride_m, 1], [BLOCK_M, BLOCK_K])
    if B_TRANSPOSED:
        b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [b_stride, 1], [BLOCK_N, BLOCK_K])
    else:
        b_desc = tl.make_tensor_descriptor(b_ptr, [K, N], [b_stride, 1], [BLOCK_K, BLOCK_N])
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([tile_m * BLOCK_M, k])
            if B_TRANSPOSED:
                b = b_desc.load([tile_n * BLOCK_N, k]).T
            else:
                b = b_desc.load([k, tile_n * BLOCK_N])
            acc = tl.dot(a, b, acc, input_precision="ieee")
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        _epilogue(
            acc, offs_m, offs_n, mask, tile_m, out_ptr, out2_ptr, bias_ptr, other_ptr, cos_ptr, sin_ptr, partial_ptr,
            out_stride_m, out2_stride_m, other_stride_m, N, T, q_start, EPILOGUE, D, R,
        )  # fmt: skip


@triton.jit
def _epilogue_kernel(
    t_ptr, out_ptr, out2_ptr, bias_ptr, other_ptr, cos_ptr, sin_ptr, partial_ptr,
    t_stride_m, out_stride_m, out2_stride_m, other_stride_m, M, N, T, q_start,
    EPILOGUE: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue on a product that lies in memory; t may be out."""
    tile_m = tl.program_id(0)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if EPILOGUE == ROTARY:
        mask = mask & (offs_n % D < R)[None, :]
    t = tl.load(t_ptr + offs_m.to(tl.int64)[:, None] * t_stride_m + offs_n[None, :], mask=mask, other=0.0)
    _epilogue(
        t.to(tl.float32), offs_m, offs_n, mask, tile_m, out_ptr, out2_ptr, bias_ptr, other_ptr, cos_ptr, sin_ptr,
        partial_ptr, out_stride_m, out2_stride_m, other_stride_m, N, T, q_start, EPILOGUE, D, R,
    )  # fmt: skip


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _takes_descriptors(*matrices: Tensor) -> bool:
    """Bulk copies want rows that start on 16 bytes and do not overlap, as those of an expanded gradient do."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % 16 == 0
        for x in matrices
    )


def _gemm(
    epilogue: tl.constexpr, a: Tensor, b: Tensor, out: Tensor, *, b_transposed: bool = True, out2: Tensor | None = None,
    bias: Tensor | None = None, other: Tensor | None = None, rotary: tuple | None = None, partial: Tensor | None = None,
) -> None:  # fmt: skip
    """out = epilogue(a b^T), or of a b, by the way that `choose_gemm` names for the shape. rotary: see `_constants`."""
    if a.shape[0] == 0:
        if partial is not None:
            partial.zero_()
        return
    if not fuses_gemm(EPILOGUES[epilogue.value], out.shape[1], a.shape[1], a.dtype, arch_of(a.device)):
        factor = b.t() if b_transposed else b
        if epilogue in (BIAS, ROTARY, GELU):
            torch.addmm(bias, a, factor, out=out)
            bias = None
        else:
            torch.mm(a, factor, out=out)
        if epilogue != BIAS:
            _elementwise(epilogue, out, out, out2, bias, other, rotary, partial)
    else:
        _triton_gemm(epilogue, a, b, out, b_transposed, out2, bias, other, rotary, partial)


def _triton_gemm(epilogue: tl.constexpr, a, b, out, b_transposed, out2, bias, other, rotary, partial) -> None:
    (M, K), N = a.shape, out.shape[1]
    config = choose_gemm(EPILOGUES[epilogue.value], a.dtype, arch_of(a.device))
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    kernel, programs = _gemm_kernel, tiles
    if config.descriptors and _takes_descriptors(a, b):
        triton.set_allocator(_scratch)
        kernel, programs = _gemm_descriptor_kernel, min(tiles, _multiprocessors(a.device))
    cos, sin, T, q_start, constants = _constants(rotary)
    kernel[(programs,)](
        a, b, out, out2, bias, other, cos, sin, partial, a.stride(0), b.stride(0), out.stride(0), _row_stride(out2),
        _row_stride(other), M, N, K, T, q_start, EPILOGUE=epilogue, B_TRANSPOSED=b_transposed,
        EVEN_K=K % config.block_k == 0, **constants, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, GROUP_M=config.group_m, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _elementwise(epilogue: tl.constexpr, t, out, out2, bias, other, rotary, partial) -> None:
    """out = epilogue(t) for a product t that lies in memory, and may be out."""
    M, N = out.shape
    config = choose_elementwise(EPILOGUES[epilogue.value], arch_of(t.device))
    cos, sin, T, q_start, constants = _constants(rotary)
    if M:
        _epilogue_kernel[(triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n))](
            t, out, out2, bias, other, cos, sin, partial, t.stride(0), out.stride(0), _row_stride(out2),
            _row_stride(other), M, N, T, q_start, EPILOGUE=epilogue, **constants, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, num_warps=config.num_warps,
        )  # fmt: skip


def _constants(rotary: tuple | None) -> tuple:
    """(cos, sin, D, T, q_start) as the kernels take it; None for epilogues that do not rotate."""
    if rotary is None:
        return None, None, 1, 0, {"D": 2, "R": 2}
    cos, sin, D, T, q_start = rotary
    return cos, sin, T, q_start, {"D": D, "R": 2 * cos.shape[1]}


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def dgelu_row_tiles(dy: Tensor, F: int) -> int:
    """How many rows the `partial` of a DGELU epilogue over F columns of a product of dy [M, C] has."""
    (M, C), arch = dy.shape, arch_of(dy.device)
    fused = fuses_gemm("dgelu", F, C, dy.dtype, arch)
    config = choose_gemm("dgelu", dy.dtype, arch) if fused else choose_elementwise("dgelu", arch)
    return max(1, triton.cdiv(M, config.block_m))


@kernel_op(mutates=("p", "z"))
def _project_in(
    y: Tensor, w_in: Tensor, b_in: Tensor, cos: Tensor, sin: Tensor, p: Tensor, z: Tensor, heads: int, T: int,
    q_start: int,
) -> None:  # fmt: skip
    """p [N, 3C+F] = y w_in^T + b_in with q and k rotated; the last F columns of z [N, C+F] get gelu of p's."""
    C, F = y.shape[1], p.shape[1] - 3 * y.shape[1]
    rotary = (cos, sin, C // heads, T, q_start)
    qk, v, h, g = p[:, : 2 * C], p[:, 2 * C : 3 * C], p[:, 3 * C :], z[:, C:]
    about = y.dtype, arch_of(y.device)
    if not fuses_gemm("rotary", 2 * C, C, *about) and not fuses_gemm("gelu", F, C, *about):  # one product for all
        torch.addmm(b_in, y, w_in.t(), out=p)
        _elementwise(ROTARY, qk, qk, None, None, None, rotary, None)
        _elementwise(GELU, h, h, g, None, None, None, None)
    else:
        _gemm(ROTARY, y, w_in[: 2 * C], qk, bias=b_in[: 2 * C], rotary=rotary)
        _gemm(BIAS, y, w_in[2 * C : 3 * C], v, bias=b_in[2 * C : 3 * C])
        _gemm(GELU, y, w_in[3 * C :], h, bias=b_in[3 * C :], out2=g)


@kernel_op(mutates=("out",))
def _project_out(z: Tensor, w_out: Tensor, b_out: Tensor, residual: Tensor, out: Tensor) -> None:
    """out [N, C] = residual + z [N, C+F] w_out^T + b_out[0] + b_out[1]."""
    _gemm(RESIDUAL, z, w_out, out, bias=b_out, other=residual)


@kernel_op(mutates=("dattn", "dh", "g", "partial"))
def _project_out_bwd(
    dy: Tensor, w_out: Tensor, h: Tensor, dattn: Tensor, dh: Tensor, g: Tensor, partial: Tensor
) -> None:  # fmt: skip
    """dattn [N, C] and dh [N, F], the gradients of z = [attn | gelu(h)] brought back to attn and h; g = gelu(h)."""
    C = dy.shape[1]
    torch.mm(dy, w_out[:, :C], out=dattn)
    _gemm(DGELU, dy, w_out[:, C:], dh, b_transposed=False, out2=g, other=h, partial=partial)


@kernel_op(mutates=("h", "g"))
def _linear_gelu(x: Tensor, w: Tensor, b: Tensor, h: Tensor, g: Tensor) -> None:
    """h [N, F] = x [N, C] w^T + b and g = gelu(h)."""
    _gemm(GELU, x, w, h, bias=b, out2=g)


@kernel_op(mutates=("dh", "g", "partial"))
def _linear_gelu_bwd(dy: Tensor, w: Tensor, h: Tensor, dh: Tensor, g: Tensor, partial: Tensor) -> None:
    """dh [N, F] = dy [N, C] w [C, F] gelu'(h), g = gelu(h), and the column sums of dh by tiles of rows."""
    _gemm(DGELU, dy, w, dh, b_transposed=False, out2=g, other=h, partial=partial)


@kernel_op(mutates=("dw_out", "dw_in"))
def _weight_gradients(
    dy: Tensor, attn: Tensor, g: Tensor, dp: Tensor, y: Tensor, dw_out: Tensor, dw_in: Tensor
) -> None:  # fmt: skip
    """dw_out [C, C+F] = dy^T [attn | g] and dw_in [3C+F, C] = dp^T y: nothing to fuse, and so cuBLAS's."""
    C = attn.shape[1]
    torch.mm(dy.t(), attn, out=dw_out[:, :C])
    torch.mm(dy.t(), g, out=dw_out[:, C:])
    torch.mm(dp.t(), y, out=dw_in)

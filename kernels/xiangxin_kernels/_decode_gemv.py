"""Device code of decode.py's products: up to 32 rows with a matrix that is read once, at the memory's speed.

A program owns BLOCK_N rows of the weight. K is walked in steps of SLICES x BLOCK_K columns, each slice a tensor-core
product of its own in a batched `tl.dot`, so that the warps divide K; the slices are added at the end, in pairs. A
step's weights are loaded while those before are multiplied, by 128-bit loads with the evict-first hint, so that
weights, each read once, leave the activations in L2; `_decode_weights.py` brings them into the products.

A row's bits are its own: K, SLICES, BLOCK_K and SPLIT_K, which alone say what is added to what, do not depend on the
number of rows; a tensor core computes each element from its row and column alone, sixteen columns at a time, the same
sixteen whatever the rows; the statistics of a row are computed from that row alone by the same warps; every other sum
is elementwise or of two terms; and the kernels are compiled without contracting products and sums.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._decode_weights import (
    LANES,
    for_products,
    load_first,
    load_weights,
    not_before,
    operand,
    parts_of,
    places_of,
    widen,
)
from ._device import gelu, rotate_pairs

STATISTICS_BLOCK = tl.constexpr(1024)  # 16 bytes a thread


@triton.jit
def _row_statistics(x_ptr, eps, C: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of a row, held in registers from the one pass to the other."""
    offs_c = tl.arange(0, STATISTICS_BLOCK)
    parts = (tl.load(x_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32),)
    for start in tl.static_range(STATISTICS_BLOCK, C, STATISTICS_BLOCK):
        parts = parts + (tl.load(x_ptr + start + offs_c, mask=offs_c < C - start, other=0.0).to(tl.float32),)
    total = tl.zeros([STATISTICS_BLOCK], tl.float32)
    for i in tl.static_range(0, len(parts)):
        total += parts[i]
    mean = tl.sum(total, 0) / C

    squares = tl.zeros([STATISTICS_BLOCK], tl.float32)
    for i in tl.static_range(0, len(parts)):
        centred = tl.where(offs_c < C - i * STATISTICS_BLOCK, parts[i] - mean, 0.0)
        squares += centred * centred
    return mean, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 0) / C + eps))


@triton.jit
def _statistics(x_ptr, x_stride_b, offs_b, B, eps, C: tl.constexpr, ROWS: tl.constexpr):
    """Those of the rows 0..B-1, [ROWS] each."""
    mean, rstd = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for row in range(B):
        row_mean, row_rstd = _row_statistics(x_ptr, eps, C)
        mean, rstd = tl.where(offs_b == row, row_mean, mean), tl.where(offs_b == row, row_rstd, rstd)
        x_ptr += x_stride_b
    return mean, rstd


@triton.jit
def _normalize(x, mean, rstd, ln_w, ln_b):
    y = (x.to(tl.float32) - mean) * rstd * ln_w.to(tl.float32) + ln_b.to(tl.float32)
    return y.to(x.dtype)


@triton.jit
def _decode_norm_kernel(
    x_ptr, ln_w_ptr, ln_b_ptr, y_ptr,
    x_stride_b,
    eps,
    C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """layer_norm(x) of one row a program, for products of so many rows that none of their programs can afford it."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride_b
    y_ptr += row * C
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    mean, rstd = _row_statistics(x_ptr, eps, C)
    for start in tl.static_range(0, C, STATISTICS_BLOCK):
        offs_c = start + tl.arange(0, STATISTICS_BLOCK)
        mask = offs_c < C
        x = tl.load(x_ptr + offs_c, mask=mask, other=0.0)
        ln_w = tl.load(ln_w_ptr + offs_c, mask=mask, other=0.0)
        ln_b = tl.load(ln_b_ptr + offs_c, mask=mask, other=0.0)
        tl.store(y_ptr + offs_c, _normalize(x, mean, rstd, ln_w, ln_b), mask=mask)


@triton.jit
def _gemv(x_ptr, x_stride_b, w_ptr, scale_ptr, tiles, first_n, N, B, first, end, mean, rstd, ln_w_ptr, ln_b_ptr,
          K: tl.constexpr, SPLIT_K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr,
          BLOCK_N: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr,
          ROWS: tl.constexpr, PIN: tl.constexpr):  # fmt: skip
    """x [ROWS, first:end] times the weight's rows from first_n on, fp32 [ROWS, BLOCK_N]; `tiles`: of `load_first`."""
    STEP: tl.constexpr = SLICES * BLOCK_K
    MASKED: tl.constexpr = K % SPLIT_K != 0 or SPLIT_K % STEP != 0
    AHEAD: tl.constexpr = DEPTH * STEP
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    OWN: tl.constexpr = BLOCK_K // LANES
    PART: tl.constexpr = min(OWN, 8)
    FAR: tl.constexpr = PART if BITS == 4 else OWN  # from a lane to the next
    NEXT: tl.constexpr = LANES * PART if BITS == 4 else PART  # from a part to the next
    RUN: tl.constexpr = 4 if BITS < 16 else 2  # what the compiler makes of operands that were joined, or were not

    offs_b, slices = places_of(ROWS, SLICES)
    own = tl.arange(0, LANES * PART)[None, :]
    columns = first + slices * BLOCK_K + own // PART * FAR + own % PART
    x_ptrs, mask_b = x_ptr + offs_b.to(tl.int64) * x_stride_b + columns, offs_b < B
    if NORM:
        mean = tl.reshape(tl.broadcast_to(mean[None, :], [SLICES, ROWS]), [SLICES * ROWS, 1])
        rstd = tl.reshape(tl.broadcast_to(rstd[None, :], [SLICES, ROWS]), [SLICES * ROWS, 1])
    if BITS == 4:
        rows, slices = places_of(BLOCK_N, SLICES)
        scale_columns = first + slices * BLOCK_K
        scale_ptrs = scale_ptr + (first_n + rows) * (K // GROUP) + scale_columns // GROUP
        scale_ptrs += tl.zeros([1, LANES], tl.int32)

    acc = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
    for step in tl.static_range(0, SPLIT_K, STEP):
        stored = parts_of(not_before(tiles[0], PIN), OWN // PART)
        if step + AHEAD < SPLIT_K:
            ahead = first + step + AHEAD
            tile = load_weights(w_ptr, first_n, N, ahead, end, K, BITS, BLOCK_N, SLICES, BLOCK_K, MASKED)
            tiles = tiles[1:] + (tile,)
        elif step + STEP < SPLIT_K:
            tiles = tiles[1:]
        for part in tl.static_range(OWN // PART):
            start = step + part * NEXT
            mask = mask_b
            if MASKED:
                mask = mask & (columns < end - start)
            x = tl.load(x_ptrs + start, mask=mask, other=0.0)
            if NORM:
                ln_w = tl.load(ln_w_ptr + columns + start, mask=columns < end - start, other=0.0)
                ln_b = tl.load(ln_b_ptr + columns + start, mask=columns < end - start, other=0.0)
                x = _normalize(x, mean, rstd, ln_w, ln_b)
            x = tl.permute(operand(x, SLICES, RUN), 0, 2, 1)
            w = operand(widen(stored[part], dtype, BITS, PIN), SLICES, RUN)
            if BITS == 4:
                if (step + part * NEXT) % GROUP == 0:
                    product = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
                product = tl.dot(w, x, product, input_precision="ieee")
                if (step + part * NEXT + NEXT) % GROUP == 0:
                    mask = (first_n + rows < N) & (scale_columns < end - start)
                    scale = tl.load(scale_ptrs + start // GROUP, mask=mask, other=0.0)
                    acc += product * for_products(scale.to(tl.float32), SLICES, ROWS)
            else:
                acc = tl.dot(w, x, acc, input_precision="ieee")
    # In pairs, whose sum is the same in any layout.
    acc = tl.sum(tl.reshape(acc, [2, SLICES // 2, BLOCK_N, ROWS]), 0)
    y = tl.trans(tl.sum(acc, 0))
    if BITS == 8:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        y *= tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _decode_project_in_kernel(
    x_ptr, ln_w_ptr, ln_b_ptr, w_ptr, scale_ptr, bias_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr,
    q_ptr, k_ptr, v_ptr, z_ptr, counter_ptr,
    x_stride_b, cache_stride_row, cache_stride_s, z_stride_b,
    B, N, counters, eps,
    C: tl.constexpr, D: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    ZEROS: tl.constexpr, PDL: tl.constexpr, PIN: tl.constexpr,
):  # fmt: skip
    """layer_norm(x) w_in^T + b_in: q, rotated, into q [B, C]; k, rotated, and v into the caches; gelu(h) into z[:, C:].

    It also sets the counters of the kernels that follow to zero, so that nothing outlives a step.
    """
    pid = tl.program_id(0)
    first_n = pid.to(tl.int64) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_b = tl.arange(0, ROWS)
    mask_b = offs_b < B
    if PDL:
        gdc_launch_dependents()
    tiles = load_first(w_ptr, first_n, N, 0, C, C, C, BITS, BLOCK_N, SLICES, BLOCK_K, DEPTH)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()

    # Asked for early, since they arrive late; held in 32 bits over the product.
    position = tl.load(position_ptr + offs_b, mask=mask_b, other=0).to(tl.int32)
    slot = offs_b
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + offs_b, mask=mask_b, other=0).to(tl.int32)
    zeros = pid * ZEROS + tl.arange(0, ZEROS)
    tl.store(counter_ptr + zeros, tl.zeros([ZEROS], tl.int32), mask=zeros < counters)
    mean, rstd = None, None
    if NORM:
        mean, rstd = _statistics(x_ptr, x_stride_b, offs_b, B, eps, C, ROWS)
    y = _gemv(
        x_ptr, x_stride_b, w_ptr, scale_ptr, tiles, first_n, N, B, 0, C, mean, rstd, ln_w_ptr, ln_b_ptr,
        C, C, GROUP, BITS, NORM, BLOCK_N, SLICES, BLOCK_K, DEPTH, ROWS, PIN,
    )  # fmt: skip
    y += bias[None, :]
    y = tl.where((offs_n < 2 * C)[None, :], rotate_pairs(y, position, offs_n, cos_ptr, sin_ptr, 1.0, D, R), y)
    y = tl.where((offs_n >= 3 * C)[None, :], gelu(y), y).to(q_ptr.dtype.element_ty)

    column = offs_n[None, :]
    mask = mask_b[:, None] & mask_n[None, :]
    cached = (slot.to(tl.int64) * cache_stride_row + position.to(tl.int64) * cache_stride_s)[:, None] + column
    tl.store(q_ptr + offs_b[:, None] * C + column, y, mask=mask & (column < C))
    tl.store(k_ptr + cached - C, y, mask=mask & (column >= C) & (column < 2 * C))
    tl.store(v_ptr + cached - 2 * C, y, mask=mask & (column >= 2 * C) & (column < 3 * C))
    tl.store(z_ptr + offs_b[:, None] * z_stride_b + column - 2 * C, y, mask=mask & (column >= 3 * C))


@triton.jit
def _decode_project_out_kernel(
    z_ptr, w_ptr, scale_ptr, bias_ptr, x_ptr, out_ptr, partial_ptr, counter_ptr,
    z_stride_b, x_stride_b,
    B, N,
    K: tl.constexpr, SPLIT_K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr, PIN: tl.constexpr,
):  # fmt: skip
    """x + z w_out^T + bias[0] + bias[1]. Programs (tile, split); a tile's last one adds its splits up in order."""
    SPLITS: tl.constexpr = (K + SPLIT_K - 1) // SPLIT_K
    tile, split = tl.program_id(0), tl.program_id(1)
    first_n = tile.to(tl.int64) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_b = tl.arange(0, ROWS)
    mask_b = offs_b < B
    first = split.to(tl.int64) * SPLIT_K
    end = tl.minimum(first + SPLIT_K, K)
    if PDL:
        gdc_launch_dependents()
    tiles = load_first(w_ptr, first_n, N, first, end, K, SPLIT_K, BITS, BLOCK_N, SLICES, BLOCK_K, DEPTH)
    if PDL:
        gdc_wait()

    y = _gemv(
        z_ptr, z_stride_b, w_ptr, scale_ptr, tiles, first_n, N, B, first, end, None, None, None, None,
        K, SPLIT_K, GROUP, BITS, False, BLOCK_N, SLICES, BLOCK_K, DEPTH, ROWS, PIN,
    )  # fmt: skip
    column = offs_n[None, :]
    mask = mask_b[:, None] & mask_n[None, :]
    here = offs_b[:, None].to(tl.int64) * N + column
    tl.store(partial_ptr + split.to(tl.int64) * B * N + here, y, mask=mask)
    tl.debug_barrier()  # all of the program's stores, not one thread's alone, come before its count
    if tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        total, parts = tl.zeros([ROWS, BLOCK_N], tl.float32), partial_ptr + here
        for _ in tl.static_range(SPLITS):
            total += tl.load(parts, mask=mask, other=0.0, cache_modifier=".cg")
            parts += B * N
        total += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        total += tl.load(bias_ptr + N + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        total += tl.load(x_ptr + offs_b[:, None].to(tl.int64) * x_stride_b + column, mask=mask, other=0.0).to(
            tl.float32
        )
        tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decode_head_kernel(
    x_ptr, ln_w_ptr, ln_b_ptr, w_ptr, scale_ptr, bias_ptr, logits_ptr,
    x_stride_b,
    B, N, eps,
    C: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr, PIN: tl.constexpr,
):  # fmt: skip
    """layer_norm(x) w^T + bias, in the dtype of the logits."""
    first_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_b = tl.arange(0, ROWS)
    mask_b = offs_b < B
    if PDL:
        gdc_launch_dependents()
    tiles = load_first(w_ptr, first_n, N, 0, C, C, C, BITS, BLOCK_N, SLICES, BLOCK_K, DEPTH)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()

    mean, rstd = None, None
    if NORM:
        mean, rstd = _statistics(x_ptr, x_stride_b, offs_b, B, eps, C, ROWS)
    y = _gemv(
        x_ptr, x_stride_b, w_ptr, scale_ptr, tiles, first_n, N, B, 0, C, mean, rstd, ln_w_ptr, ln_b_ptr,
        C, C, GROUP, BITS, NORM, BLOCK_N, SLICES, BLOCK_K, DEPTH, ROWS, PIN,
    )  # fmt: skip
    y += bias[None, :]
    rows = logits_ptr + offs_b[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(rows, y.to(logits_ptr.dtype.element_ty), mask=mask_b[:, None] & mask_n[None, :])

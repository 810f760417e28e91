"""Device code of decode.py's products: up to 32 rows with a matrix that is read once, at the memory's speed.

A program owns BLOCK_N rows of the weight. K is walked in steps of SLICES x BLOCK_K columns, a step's weights being
loaded while those before are multiplied, straight into registers: of all loads only those keep the evict-first hint,
so that weights, each read once, leave the activations in L2. Each slice of a step is a tensor-core product of its own
in a batched `tl.dot`, so that the warps divide K; the slices are added at the end, in pairs.

A row's bits are its own: K, SLICES, BLOCK_K and SPLIT_K, which alone say what is added to what, do not depend on the
number of rows; a tensor core computes each element from its row and column alone, in the order of K; sums over columns
of x lie in the same lanes whatever ROWS is (8 columns a thread, 16 threads a row: tests read it off the compiled code);
every other sum is elementwise or of two terms; and the kernels are compiled without contracting products and sums.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._device import gelu, rotate_pairs

STATISTICS_BLOCK = tl.constexpr(128)
STATISTICS_UNROLL = tl.constexpr(4)  # loads that are under way together; all of a row's would leave no registers


@triton.jit
def _load_codes(w_ptr, offs_n, mask_n, first, end, K: tl.constexpr, BITS: tl.constexpr,
                SLICES: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The weights [SLICES, BLOCK_N, BLOCK_K] of the step at column `first`, as stored: with BITS 4 two to a byte."""
    PACKED: tl.constexpr = 2 if BITS == 4 else 1
    WIDTH: tl.constexpr = BLOCK_K // PACKED
    columns = first // PACKED + tl.arange(0, SLICES)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    mask = mask_n[None, :, None]
    if MASKED:
        mask = mask & (columns < end // PACKED)
    ptrs = w_ptr + offs_n[None, :, None] * (K // PACKED) + columns
    return tl.load(ptrs, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _load_first(w_ptr, offs_n, mask_n, first, end, K: tl.constexpr, SPLIT_K: tl.constexpr, BITS: tl.constexpr,
                SLICES: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """The weights of the first DEPTH steps."""
    STEP: tl.constexpr = SLICES * BLOCK_K
    MASKED: tl.constexpr = K % SPLIT_K != 0 or SPLIT_K % STEP != 0
    tiles = (_load_codes(w_ptr, offs_n, mask_n, first, end, K, BITS, SLICES, BLOCK_K, MASKED),)
    for i in tl.static_range(1, DEPTH):
        if i * STEP < SPLIT_K:
            ahead = _load_codes(w_ptr, offs_n, mask_n, first + i * STEP, end, K, BITS, SLICES, BLOCK_K, MASKED)
            tiles = tiles + (ahead,)
    return tiles


@triton.jit
def _widen(codes, dtype: tl.constexpr, BITS: tl.constexpr):
    """Stored weights in `dtype`, exactly; quantized ones without their scale.

    An integer in the low bits of the fp32 number 2^23 is that number plus itself: one logical operation and one
    subtraction, where the conversion instruction has a quarter of their rate.
    """
    if BITS == 4:
        wide = codes.to(tl.int32)
        low = ((wide & 0xF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
        high = ((wide >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
        pairs = tl.join(low.to(dtype), high.to(dtype))
        return tl.reshape(pairs, [codes.shape[0], codes.shape[1], 2 * codes.shape[2]])
    elif BITS == 8:
        wide = codes.to(tl.uint8, bitcast=True).to(tl.int32)
        return (((wide ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0).to(dtype)
    else:
        return codes


@triton.jit
def _not_before(x, PIN: tl.constexpr):
    """x, which with PIN stays in the registers it was loaded into up to here.

    The compiler else moves its way through shared memory right behind the load, and with it the wait. The instruction
    itself goes away; the interpreter, which has none, needs no PIN.
    """
    if PIN:
        packed: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=packed)
    else:
        return x


@triton.jit
def _row_statistics(x_ptr, x_stride_b, offs_b, mask_b, eps, C: tl.constexpr, ROWS: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) [ROWS] as layer_norm.py has them: the second pass corrects the first's mean."""
    offs_c = tl.arange(0, STATISTICS_BLOCK)
    rows = x_ptr + offs_b[:, None] * x_stride_b + offs_c[None, :]
    total = tl.zeros([ROWS, STATISTICS_BLOCK], tl.float32)
    for start in tl.range(0, C, STATISTICS_BLOCK, loop_unroll_factor=STATISTICS_UNROLL):
        mask = mask_b[:, None] & (offs_c < C - start)[None, :]
        total += tl.load(rows + start, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / C

    first = tl.zeros([ROWS, STATISTICS_BLOCK], tl.float32)
    second = tl.zeros([ROWS, STATISTICS_BLOCK], tl.float32)
    for start in tl.range(0, C, STATISTICS_BLOCK, loop_unroll_factor=STATISTICS_UNROLL):
        inside = (offs_c < C - start)[None, :]
        x = tl.load(rows + start, mask=mask_b[:, None] & inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - mean[:, None], 0.0)
        first += centred
        second += centred * centred
    correction = tl.sum(first, 1) / C
    var = tl.maximum(tl.sum(second, 1) / C - correction * correction, 0.0)
    return mean + correction, tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def _normalize(x, mean, rstd, ln_w, ln_b):
    y = (x.to(tl.float32) - mean) * rstd * ln_w.to(tl.float32) + ln_b.to(tl.float32)
    return y.to(x.dtype)


@triton.jit
def _decode_norm_kernel(
    x_ptr, ln_w_ptr, ln_b_ptr, y_ptr,
    x_stride_b,
    eps,
    C: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """layer_norm(x) of one row a program, for products of so many rows that none of their programs can afford it."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride_b
    y_ptr += row * C
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    offs_b = tl.arange(0, ROWS)
    mask_b = offs_b < 1
    mean, rstd = _row_statistics(x_ptr, 0, offs_b, mask_b, eps, C, ROWS)
    for start in tl.range(0, C, STATISTICS_BLOCK, loop_unroll_factor=STATISTICS_UNROLL):
        offs_c = start + tl.arange(0, STATISTICS_BLOCK)
        mask = mask_b[:, None] & (offs_c < C)[None, :]
        here = tl.broadcast_to(offs_c[None, :], [ROWS, STATISTICS_BLOCK])
        x = tl.load(x_ptr + here, mask=mask, other=0.0)
        ln_w = tl.load(ln_w_ptr + offs_c, mask=offs_c < C, other=0.0)[None, :]
        ln_b = tl.load(ln_b_ptr + offs_c, mask=offs_c < C, other=0.0)[None, :]
        y = _normalize(x, mean[:, None], rstd[:, None], ln_w, ln_b)
        tl.store(y_ptr + here, y, mask=mask)


@triton.jit
def _gemv(x_ptr, x_stride_b, w_ptr, scale_ptr, tiles, offs_n, mask_n, offs_b, mask_b, first, end, mean, rstd, ln_w_ptr,
          ln_b_ptr, K: tl.constexpr, SPLIT_K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
          NORM: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr,
          DEPTH: tl.constexpr, ROWS: tl.constexpr, PIN: tl.constexpr):  # fmt: skip
    """x [ROWS, first:end] times the weight's rows offs_n, fp32 [ROWS, BLOCK_N]; `tiles` are from `_load_first`."""
    STEP: tl.constexpr = SLICES * BLOCK_K
    MASKED: tl.constexpr = K % SPLIT_K != 0 or SPLIT_K % STEP != 0
    AHEAD: tl.constexpr = DEPTH * STEP
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = first + tl.arange(0, SLICES)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    acc = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
    for step in tl.static_range(0, SPLIT_K, STEP):
        codes = _not_before(tiles[0], PIN)
        if step + AHEAD < SPLIT_K:
            ahead = _load_codes(w_ptr, offs_n, mask_n, first + step + AHEAD, end, K, BITS, SLICES, BLOCK_K, MASKED)
            tiles = tiles[1:] + (ahead,)
        elif step + STEP < SPLIT_K:
            tiles = tiles[1:]
        here = columns + step
        mask = mask_b[None, :, None]
        if MASKED:
            mask = mask & (here < end)
        x = tl.load(x_ptr + offs_b[None, :, None] * x_stride_b + here, mask=mask, other=0.0)
        if NORM:
            ln_w = tl.load(ln_w_ptr + here, mask=here < end, other=0.0)
            ln_b = tl.load(ln_b_ptr + here, mask=here < end, other=0.0)
            x = _normalize(x, mean[None, :, None], rstd[None, :, None], ln_w, ln_b)
        x = tl.permute(x, 0, 2, 1)
        if BITS == 4:
            product = tl.dot(_widen(codes, dtype, BITS), x, input_precision="ieee")
            group = (first + step + tl.arange(0, SLICES)[:, None] * BLOCK_K) // GROUP
            inside = mask_n[None, :] & (group < K // GROUP)
            scale = tl.load(scale_ptr + offs_n[None, :] * (K // GROUP) + group, mask=inside, other=0.0)
            acc += product * scale.to(tl.float32)[:, :, None]
        else:
            acc = tl.dot(_widen(codes, dtype, BITS), x, acc, input_precision="ieee")
    # In pairs, whose sum is the same in any layout.
    if SLICES == 8:
        acc = tl.sum(tl.reshape(acc, [2, 4, BLOCK_N, ROWS]), 0)
    if SLICES >= 4:
        acc = tl.sum(tl.reshape(acc, [2, 2, BLOCK_N, ROWS]), 0)
    y = tl.trans(tl.sum(acc, 0))
    if BITS == 8:
        y *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
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
    offs_n = pid.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_b = tl.arange(0, ROWS)
    mask_b = offs_b < B
    if PDL:
        gdc_launch_dependents()
    tiles = _load_first(w_ptr, offs_n, mask_n, 0, C, C, C, BITS, SLICES, BLOCK_K, DEPTH)
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
        mean, rstd = _row_statistics(x_ptr, x_stride_b, offs_b, mask_b, eps, C, ROWS)
    y = _gemv(
        x_ptr, x_stride_b, w_ptr, scale_ptr, tiles, offs_n, mask_n, offs_b, mask_b, 0, C, mean, rstd, ln_w_ptr,
        ln_b_ptr, C, C, GROUP, BITS, NORM, BLOCK_N, SLICES, BLOCK_K, DEPTH, ROWS, PIN,
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
    offs_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_b = tl.arange(0, ROWS)
    mask_b = offs_b < B
    first = split.to(tl.int64) * SPLIT_K
    end = tl.minimum(first + SPLIT_K, K)
    if PDL:
        gdc_launch_dependents()
    tiles = _load_first(w_ptr, offs_n, mask_n, first, end, K, SPLIT_K, BITS, SLICES, BLOCK_K, DEPTH)
    if PDL:
        gdc_wait()

    y = _gemv(
        z_ptr, z_stride_b, w_ptr, scale_ptr, tiles, offs_n, mask_n, offs_b, mask_b, first, end, None, None, None,
        None, K, SPLIT_K, GROUP, BITS, False, BLOCK_N, SLICES, BLOCK_K, DEPTH, ROWS, PIN,
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
        total += tl.load(x_ptr + offs_b[:, None] * x_stride_b + column, mask=mask, other=0.0).to(tl.float32)
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
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_b = tl.arange(0, ROWS)
    mask_b = offs_b < B
    if PDL:
        gdc_launch_dependents()
    tiles = _load_first(w_ptr, offs_n, mask_n, 0, C, C, C, BITS, SLICES, BLOCK_K, DEPTH)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()

    mean, rstd = None, None
    if NORM:
        mean, rstd = _row_statistics(x_ptr, x_stride_b, offs_b, mask_b, eps, C, ROWS)
    y = _gemv(
        x_ptr, x_stride_b, w_ptr, scale_ptr, tiles, offs_n, mask_n, offs_b, mask_b, 0, C, mean, rstd, ln_w_ptr,
        ln_b_ptr, C, C, GROUP, BITS, NORM, BLOCK_N, SLICES, BLOCK_K, DEPTH, ROWS, PIN,
    )  # fmt: skip
    y += bias[None, :]
    rows = logits_ptr + offs_b[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(rows, y.to(logits_ptr.dtype.element_ty), mask=mask_b[:, None] & mask_n[None, :])

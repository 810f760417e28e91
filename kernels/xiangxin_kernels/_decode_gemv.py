"""Device code of decode.py's products: up to 32 rows with a matrix that is read once, at the memory's speed.

A program owns BLOCK_N rows of the weight. K is walked in steps of SLICES x BLOCK_K columns, each slice a tensor-core
product of its own in a batched `tl.dot`, so that the warps divide K; the slices are added at the end, in pairs. A
step's weights are loaded while those before are multiplied, by 128-bit loads with the evict-first hint, so that
weights, each read once, leave the activations in L2.

Weights go from those loads into the products' operands without leaving their thread. A tensor core takes column k of
both its operands from the same lane of four, in runs of a few columns. A thread's 16 bytes are a longer run; which
columns they are does not matter as long as both operands agree. So a tile is loaded with 8 of its rows, then the
slices, then the rows beyond 8 along one dimension and 4 lanes of 16 bytes along the other, the way the compiler deals
elements out to lanes, warps and registers, and `_operand` only renames. Nothing moves, which tests read off the
compiled code.

A row's bits are its own: K, SLICES, BLOCK_K and SPLIT_K, which alone say what is added to what, do not depend on the
number of rows; a tensor core computes each element from its row and column alone, in the order of K; the statistics of
a row are computed from that row alone by the same warps; every other sum is elementwise or of two terms; and the
kernels are compiled without contracting products and sums.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._device import gelu, rotate_pairs

LANES = tl.constexpr(4)  # of a tensor core's operand that share a row, and its rows
TILE = tl.constexpr(8)
OFFSET = tl.constexpr(136.0)  # what codes of 4 bits are too large by: 128 of `_nibbles`, 8 of the format
MINUS_OFFSETS = tl.constexpr(-0x3CF73CF8)  # two bf16 numbers of -OFFSET, as bits
STATISTICS_BLOCK = tl.constexpr(1024)  # 16 bytes a thread


@triton.jit
def _places(N: tl.constexpr, SLICES: tl.constexpr):
    """For a tile of N rows as loaded, [SLICES N, 1]: which row each place has, and which slice."""
    places = tl.arange(0, SLICES * N)[:, None]
    return places // (SLICES * TILE) * TILE + places % TILE, places // TILE % SLICES


@triton.jit
def _load_weights(w_ptr, first_n, N, first, end, K: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr,
                  SLICES: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The weights [SLICES BLOCK_N, BLOCK_K] of the step at column `first`, as stored: rounded ones in words."""
    PACKED: tl.constexpr = 32 // BITS if BITS < 16 else 1
    WIDTH: tl.constexpr = BLOCK_K // PACKED
    rows, slices = _places(BLOCK_N, SLICES)
    words = first // PACKED + slices * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = first_n + rows < N
    if MASKED:
        mask = mask & (words < end // PACKED)
    ptrs = w_ptr + (first_n + rows) * (K // PACKED) + words
    return tl.load(ptrs, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _load_first(w_ptr, first_n, N, first, end, K: tl.constexpr, SPLIT_K: tl.constexpr, BITS: tl.constexpr,
                BLOCK_N: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """The weights of the first DEPTH steps."""
    STEP: tl.constexpr = SLICES * BLOCK_K
    MASKED: tl.constexpr = K % SPLIT_K != 0 or SPLIT_K % STEP != 0
    tiles = (_load_weights(w_ptr, first_n, N, first, end, K, BITS, BLOCK_N, SLICES, BLOCK_K, MASKED),)
    for i in tl.static_range(1, DEPTH):
        if i * STEP < SPLIT_K:
            ahead = first + i * STEP
            tile = _load_weights(w_ptr, first_n, N, ahead, end, K, BITS, BLOCK_N, SLICES, BLOCK_K, MASKED)
            tiles = tiles + (tile,)
    return tiles


@triton.jit
def _not_before(x, PIN: tl.constexpr):
    """x, which with PIN stays in the registers it was loaded into up to here.

    The compiler else widens or moves it right behind the load, and waits for it there. The instruction itself goes
    away; the interpreter, which has none, needs no PIN.
    """
    if PIN:
        packed: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=packed)
    else:
        return x


@triton.jit
def _in_turns(a, b, c, d):
    """Four tensors [A, n] as one [A, 4 n]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4 * a.shape[1]])


@triton.jit
def _halves(words, PIN: tl.constexpr):
    """The two bf16 numbers in each word [A, n], the low one first: [A, 2 n]."""
    words = _not_before(words, PIN)  # else what made them is done again for each half
    low = words.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@triton.jit
def _nibbles(words, SHIFT: tl.constexpr):
    """Two codes of each word as bf16 numbers, 128 too large: the low four bits of 128 are free."""
    return ((words >> SHIFT) & 0x000F000F) | 0x43004300


@triton.jit
def _byte(words, SHIFT: tl.constexpr):
    """A code of each word in fp32: the low bits of 2^23 are free. Converting instructions have a quarter the rate."""
    return (((words >> SHIFT) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _widen(stored, dtype: tl.constexpr, BITS: tl.constexpr, PIN: tl.constexpr):
    """Stored weights in `dtype`, exactly, quantized ones without their scale; those of 4 bits in bf16 plus OFFSET."""
    if BITS == 4:
        words = _in_turns(_nibbles(stored, 0), _nibbles(stored, 4), _nibbles(stored, 8), _nibbles(stored, 12))
        if dtype == tl.bfloat16:
            return _halves(words, PIN)
        else:
            return (_halves(words, PIN).to(tl.float32) - OFFSET).to(dtype)
    elif BITS == 8:
        return _in_turns(_byte(stored, 0), _byte(stored, 8), _byte(stored, 16), _byte(stored, 24)).to(dtype)
    else:
        return stored


@triton.jit
def _parts(stored, COUNT: tl.constexpr):
    """A tile of weights as loaded in COUNT tiles, the first of which has the first of each lane's columns."""
    if COUNT == 1:
        return (stored,)
    else:
        HALF: tl.constexpr = stored.shape[1] // LANES // 2
        halves = tl.permute(tl.reshape(stored, [stored.shape[0], LANES, 2, HALF]), 0, 1, 3, 2)
        first, second = tl.split(halves)
        first = tl.reshape(first, [stored.shape[0], LANES * HALF])
        second = tl.reshape(second, [stored.shape[0], LANES * HALF])
        return _parts(first, COUNT // 2) + _parts(second, COUNT // 2)


@triton.jit
def _operand(tile, SLICES: tl.constexpr, RUN: tl.constexpr):
    """A tile [SLICES n, columns] of weights or of x as loaded, now [SLICES, n, columns]: see the head of this file."""
    N: tl.constexpr = tile.shape[0] // SLICES
    COLUMNS: tl.constexpr = tile.shape[1]
    tile = tl.reshape(tile, [N // TILE, SLICES, TILE, LANES, COLUMNS // LANES // RUN, RUN])
    return tl.reshape(tl.permute(tile, 1, 0, 2, 4, 3, 5), [SLICES, N, COLUMNS])


@triton.jit
def _for_products(scale, SLICES: tl.constexpr, ROWS: tl.constexpr):
    """Scales [SLICES n, lane], equal in all lanes, for products [SLICES, n, ROWS]: a lane has pairs of ROWS."""
    N: tl.constexpr = scale.shape[0] // SLICES
    scale = tl.reshape(scale, [N // TILE, SLICES, TILE, 1, LANES, 1])
    scale = tl.broadcast_to(scale, [N // TILE, SLICES, TILE, ROWS // TILE, LANES, TILE // LANES])
    return tl.reshape(tl.permute(scale, 1, 0, 2, 3, 4, 5), [SLICES, N, ROWS])


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
    """x [ROWS, first:end] times the weight's rows from first_n on, fp32 [ROWS, BLOCK_N]; `tiles`: of `_load_first`."""
    STEP: tl.constexpr = SLICES * BLOCK_K
    MASKED: tl.constexpr = K % SPLIT_K != 0 or SPLIT_K % STEP != 0
    AHEAD: tl.constexpr = DEPTH * STEP
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # A lane's columns of a slice, PART of which it multiplies at once: 16 bytes of x, which lie together.
    OWN: tl.constexpr = BLOCK_K // LANES
    PART: tl.constexpr = min(OWN, 8)
    FAR: tl.constexpr = PART if BITS == 4 else OWN  # from a lane to the next
    NEXT: tl.constexpr = LANES * PART if BITS == 4 else PART  # from a part to the next
    IS_OFFSET: tl.constexpr = BITS == 4 and dtype == tl.bfloat16
    RUN: tl.constexpr = 4 if BITS < 16 else 2  # what the compiler makes of operands that were joined, or were not

    offs_b, slices = _places(ROWS, SLICES)
    own = tl.arange(0, LANES * PART)[None, :]
    columns = first + slices * BLOCK_K + own // PART * FAR + own % PART
    x_ptrs, mask_b = x_ptr + offs_b * x_stride_b + columns, offs_b < B
    if NORM:
        mean = tl.reshape(tl.broadcast_to(mean[None, :], [SLICES, ROWS]), [SLICES * ROWS, 1])
        rstd = tl.reshape(tl.broadcast_to(rstd[None, :], [SLICES, ROWS]), [SLICES * ROWS, 1])
    if BITS == 4:
        rows, slices = _places(BLOCK_N, SLICES)
        scale_columns = first + slices * BLOCK_K
        scale_ptrs = scale_ptr + (first_n + rows) * (K // GROUP) + scale_columns // GROUP
        scale_ptrs += tl.zeros([1, LANES], tl.int32)
    if IS_OFFSET:
        words = tl.full([SLICES * BLOCK_N, LANES * PART // 2], MINUS_OFFSETS, tl.int32)
        minus_offset = _operand(_halves(words, PIN), SLICES, RUN)

    acc = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
    for step in tl.static_range(0, SPLIT_K, STEP):
        stored = _parts(_not_before(tiles[0], PIN), OWN // PART)
        if step + AHEAD < SPLIT_K:
            ahead = first + step + AHEAD
            tile = _load_weights(w_ptr, first_n, N, ahead, end, K, BITS, BLOCK_N, SLICES, BLOCK_K, MASKED)
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
            x = tl.permute(_operand(x, SLICES, RUN), 0, 2, 1)
            w = _operand(_widen(stored[part], dtype, BITS, PIN), SLICES, RUN)
            if BITS == 4:
                if (step + part * NEXT) % GROUP == 0:
                    product = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
                if IS_OFFSET:  # the tensor cores subtract too, with time to spare
                    product = tl.dot(minus_offset, x, product, input_precision="ieee")
                product = tl.dot(w, x, product, input_precision="ieee")
                if (step + part * NEXT + NEXT) % GROUP == 0:
                    mask = (first_n + rows < N) & (scale_columns < end - start)
                    scale = tl.load(scale_ptrs + start // GROUP, mask=mask, other=0.0)
                    acc += product * _for_products(scale.to(tl.float32), SLICES, ROWS)
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
    tiles = _load_first(w_ptr, first_n, N, 0, C, C, C, BITS, BLOCK_N, SLICES, BLOCK_K, DEPTH)
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
    tiles = _load_first(w_ptr, first_n, N, first, end, K, SPLIT_K, BITS, BLOCK_N, SLICES, BLOCK_K, DEPTH)
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
    first_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_b = tl.arange(0, ROWS)
    mask_b = offs_b < B
    if PDL:
        gdc_launch_dependents()
    tiles = _load_first(w_ptr, first_n, N, 0, C, C, C, BITS, BLOCK_N, SLICES, BLOCK_K, DEPTH)
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

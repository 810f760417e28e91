"""Device code of attention.py: what forward and backward share, the rotation of q and k, and the forward kernel.

A head's D columns are held as [main | tail], two powers of two (80 = 64 + 16), and every product is taken per part, so
that matrix work is issued for D columns and no more. D_TAIL = 0 removes the second part at compile time.
"""

import triton
import triton.language as tl

from ._device import rotate_pairs


@triton.jit
def _tile_and_head(pid, tiles, heads, HEADS_PER_GROUP: tl.constexpr):
    """Tile and head of a program: `HEADS_PER_GROUP` heads at a time (their keys fit in L2), first all their tiles 0,
    then all their tiles 1. With the longest tile as 0, what still runs when the SMs run dry is short."""
    group = pid // (tiles * HEADS_PER_GROUP)
    first = group * HEADS_PER_GROUP
    size = tl.minimum(heads - first, HEADS_PER_GROUP)
    local = pid - tiles * first
    return local // size, first + local % size


@triton.jit
def _load_tile(base_ptr, first, stride_t, offs_t, offs_d, end, MASKED: tl.constexpr):
    """Rows first + offs_t of a matrix; `first` is widened, since it times the stride passes 2^31 in a long sequence."""
    ptrs = base_ptr + tl.cast(first, tl.int64) * stride_t + offs_t[:, None] * stride_t + offs_d[None, :]
    if MASKED:
        return tl.load(ptrs, mask=(first + offs_t < end)[:, None], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _store_tile(base_ptr, first, stride_t, offs_t, offs_d, end, x):
    ptrs = base_ptr + tl.cast(first, tl.int64) * stride_t + offs_t[:, None] * stride_t + offs_d[None, :]
    tl.store(ptrs, x.to(base_ptr.dtype.element_ty), mask=(first + offs_t < end)[:, None])


@triton.jit
def _product(a_main, a_tail, b_main, b_tail, D_TAIL: tl.constexpr):
    """a b^T over both parts of the columns."""
    x = tl.dot(a_main, tl.trans(b_main), input_precision="ieee")
    if D_TAIL > 0:
        x = tl.dot(a_tail, tl.trans(b_tail), x, input_precision="ieee")
    return x


@triton.jit
def _partner(main, tail, offs_d, R: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr):
    """For each column of `offs_d` below R the one it is rotated with, R/2 away, from either part; anything beyond."""
    column = ((offs_d + R // 2) % R)[None, :] + tl.zeros([main.shape[0], 1], tl.int32)
    partner = tl.gather(main, tl.minimum(column, D_MAIN - 1), 1)
    if R > D_MAIN:
        from_tail = tl.gather(tail, tl.maximum(column - D_MAIN, 0), 1)
        partner = tl.where(column < D_MAIN, partner, from_tail)
    return partner


@triton.jit
def _rotate_part(x, partner, position, valid, cos_ptr, sin_ptr, offs_d, SIGN: tl.constexpr, R: tl.constexpr):
    half: tl.constexpr = R // 2
    rotary = offs_d < R
    ptrs = tl.cast(position, tl.int64)[:, None] * half + (offs_d % half)[None, :]
    mask = valid[:, None] & rotary[None, :]
    cos = tl.load(cos_ptr + ptrs, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + ptrs, mask=mask, other=0.0)
    sin = tl.where(offs_d < half, -SIGN, SIGN)[None, :] * sin
    return tl.where(rotary[None, :], x * cos + partner * sin, x)


@triton.jit
def _rotate(
    main,
    tail,
    position,
    valid,
    cos_ptr,
    sin_ptr,
    SIGN: tl.constexpr,
    PAIRS: tl.constexpr,
    R: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
):
    """The parts (fp32) of rows at `position` [rows], rotated by their angles (SIGN 1) or back (SIGN -1). PAIRS: dim 2i
    turns with dim 2i + 1, not i with i + R/2."""
    # One return at the end: what stands behind one inside an `if` is compiled too, and tl.arange(0, 0) does not.
    D: tl.constexpr = D_MAIN + D_TAIL
    offs_main = tl.arange(0, D_MAIN)
    row = tl.where(valid, position, 0)
    new_tail = tail
    if PAIRS:
        new_main = rotate_pairs(main, row, offs_main, cos_ptr, sin_ptr, SIGN, D, R)
    else:
        partner = _partner(main, tail, offs_main, R, D_MAIN, D_TAIL)
        new_main = _rotate_part(main, partner, position, valid, cos_ptr, sin_ptr, offs_main, SIGN, R)
    if R > D_MAIN:
        offs_tail = D_MAIN + tl.arange(0, D_TAIL)
        if PAIRS:
            new_tail = rotate_pairs(tail, row, offs_tail, cos_ptr, sin_ptr, SIGN, D, R)
        else:
            partner = _partner(main, tail, offs_tail, R, D_MAIN, D_TAIL)
            new_tail = _rotate_part(tail, partner, position, valid, cos_ptr, sin_ptr, offs_tail, SIGN, R)
    return new_main, new_tail


@triton.jit
def _attention_rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    x_stride_b,
    x_stride_t,
    x_stride_h,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    T,
    H,
    R: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    batch = tl.cast(bh // H, tl.int64)
    head = tl.cast(bh % H, tl.int64)
    x_ptr += batch * x_stride_b + head * x_stride_h
    out_ptr += batch * out_stride_b + head * out_stride_h
    offs_t = tl.arange(0, BLOCK_T)
    offs_main = tl.arange(0, D_MAIN)
    first = tile * BLOCK_T
    main = _load_tile(x_ptr, first, x_stride_t, offs_t, offs_main, T, True).to(tl.float32)
    tail = main
    if D_TAIL > 0:
        offs_tail = D_MAIN + tl.arange(0, D_TAIL)
        tail = _load_tile(x_ptr, first, x_stride_t, offs_t, offs_tail, T, True).to(tl.float32)
    valid = first + offs_t < T
    main, tail = _rotate(main, tail, first + offs_t, valid, cos_ptr, sin_ptr, 1, False, R, D_MAIN, D_TAIL)
    _store_tile(out_ptr, first, out_stride_t, offs_t, offs_main, T, main)
    if D_TAIL > 0:
        _store_tile(out_ptr, first, out_stride_t, offs_t, offs_tail, T, tail)


@triton.jit
def _attend(
    acc_main,
    acc_tail,
    m_i,
    l_i,
    q_main,
    q_tail,
    k_ptr,
    v_ptr,
    k_stride_t,
    v_stride_t,
    lo,
    hi,
    position,
    doc_start,
    scale_log2,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Online softmax over the key tiles [lo, hi). DIAGONAL: a query may stand before a key, and keys end at hi.
    DOCUMENTS: its document may start after a key. Neither: every key is visible to every query."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_main = tl.arange(0, D_MAIN)
    for start_n in tl.range(lo, hi, BLOCK_N):
        k_main = _load_tile(k_ptr, start_n, k_stride_t, offs_n, offs_main, hi, DIAGONAL)
        k_tail = k_main
        if D_TAIL > 0:
            offs_tail = D_MAIN + tl.arange(0, D_TAIL)
            k_tail = _load_tile(k_ptr, start_n, k_stride_t, offs_n, offs_tail, hi, DIAGONAL)
        s = _product(q_main, q_tail, k_main, k_tail, D_TAIL)
        key = (start_n + offs_n)[None, :]
        if DIAGONAL:
            s = tl.where(key <= position[:, None], s, float("-inf"))
        if DOCUMENTS:
            s = tl.where(key >= doc_start[:, None], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
        # A row that has seen no key yet would turn -inf - -inf into NaN.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * scale_log2 - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_main = _load_tile(v_ptr, start_n, v_stride_t, offs_n, offs_main, hi, DIAGONAL)
        p = p.to(v_main.dtype)
        acc_main = tl.dot(p, v_main, acc_main * alpha[:, None], input_precision="ieee")
        if D_TAIL > 0:
            v_tail = _load_tile(v_ptr, start_n, v_stride_t, offs_n, offs_tail, hi, DIAGONAL)
            acc_tail = tl.dot(p, v_tail, acc_tail * alpha[:, None], input_precision="ieee")
        m_i = m_new
    return acc_main, acc_tail, m_i, l_i


@triton.jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    doc_start_ptr,
    out_ptr,
    copy_ptr,
    lse_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    copy_stride_b,
    copy_stride_t,
    copy_stride_h,
    doc_stride_b,
    B,
    T,
    H,
    q_start,
    scale_log2,
    R: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL_N: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
):
    """The tiles on the diagonal hold DIAGONAL_N keys."""
    tiles = tl.cdiv(T, BLOCK_M)
    index, bh = _tile_and_head(tl.program_id(0), tiles, B * H, HEADS_PER_GROUP)
    start_m = (tiles - 1 - index) * BLOCK_M
    batch = tl.cast(bh // H, tl.int64)
    head = tl.cast(bh % H, tl.int64)
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    out_ptr += batch * out_stride_b + head * out_stride_h
    lse_ptr += tl.cast(bh, tl.int64) * T

    offs_m = tl.arange(0, BLOCK_M)
    offs_main = tl.arange(0, D_MAIN)
    mask_m = start_m + offs_m < T
    position = q_start + start_m + offs_m
    q_main = _load_tile(q_ptr, start_m, q_stride_t, offs_m, offs_main, T, True)
    q_tail = q_main
    if D_TAIL > 0:
        offs_tail = D_MAIN + tl.arange(0, D_TAIL)
        q_tail = _load_tile(q_ptr, start_m, q_stride_t, offs_m, offs_tail, T, True)
    if R > 0:
        x_main, x_tail = _rotate(
            q_main.to(tl.float32), q_tail.to(tl.float32), position, mask_m, cos_ptr, sin_ptr, 1, False, R, D_MAIN,
            D_TAIL,
        )  # fmt: skip
        q_main = x_main.to(q_main.dtype)
        q_tail = x_tail.to(q_tail.dtype)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc_main = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
    acc_tail = acc_main
    if D_TAIL > 0:
        acc_tail = tl.zeros([BLOCK_M, D_TAIL], tl.float32)
    lo = 0
    hi = q_start + tl.minimum(start_m + BLOCK_M, T)
    full_end = (q_start + start_m + 1) // BLOCK_N * BLOCK_N
    doc_start = position
    if DOCUMENTS:
        doc_start_ptr += batch * doc_stride_b + q_start
        doc_start = tl.load(doc_start_ptr + start_m + offs_m, mask=mask_m, other=0)
        lo = tl.load(doc_start_ptr + start_m) // BLOCK_N * BLOCK_N
        last_start = tl.load(doc_start_ptr + tl.minimum(start_m + BLOCK_M, T) - 1)
        full_end = tl.maximum(full_end, lo)
        full_start = tl.minimum(tl.cdiv(last_start, BLOCK_N) * BLOCK_N, full_end)
        acc_main, acc_tail, m_i, l_i = _attend(
            acc_main, acc_tail, m_i, l_i, q_main, q_tail, k_ptr, v_ptr, k_stride_t, v_stride_t, lo, full_start,
            position, doc_start, scale_log2, D_MAIN, D_TAIL, BLOCK_N, False, True,
        )  # fmt: skip
        lo = full_start
    acc_main, acc_tail, m_i, l_i = _attend(
        acc_main, acc_tail, m_i, l_i, q_main, q_tail, k_ptr, v_ptr, k_stride_t, v_stride_t, lo, full_end,
        position, doc_start, scale_log2, D_MAIN, D_TAIL, BLOCK_N, False, False,
    )  # fmt: skip
    acc_main, acc_tail, m_i, l_i = _attend(
        acc_main, acc_tail, m_i, l_i, q_main, q_tail, k_ptr, v_ptr, k_stride_t, v_stride_t, full_end, hi,
        position, doc_start, scale_log2, D_MAIN, D_TAIL, DIAGONAL_N, True, DOCUMENTS,
    )  # fmt: skip

    tl.store(lse_ptr + start_m + offs_m, m_i + tl.log2(l_i), mask=mask_m)
    acc_main /= l_i[:, None]
    acc_tail /= l_i[:, None]
    _store_tile(out_ptr, start_m, out_stride_t, offs_m, offs_main, T, acc_main)
    if D_TAIL > 0:
        _store_tile(out_ptr, start_m, out_stride_t, offs_m, offs_tail, T, acc_tail)
    if copy_ptr is not None:
        copy_ptr += batch * copy_stride_b + head * copy_stride_h
        _store_tile(copy_ptr, start_m, copy_stride_t, offs_m, offs_main, T, acc_main)
        if D_TAIL > 0:
            _store_tile(copy_ptr, start_m, copy_stride_t, offs_m, offs_tail, T, acc_tail)

"""Device code of attention.py: the backward kernels. q and k come rotated; dq and dk are rotated back at the end.

With s = log2(e) * scale * q k^T, p = exp2(s - lse) and delta = sum_d(dout * out):
    dv = p^T dout      ds = p * (dout v^T - delta)      dq = scale * ds k      dk = scale * ds^T q
dq is accumulated by rows, dk and dv by columns, each in its own kernel: no atomics, so the same bits every time. Both
recompute q k^T and dout v^T, so that 7 products are issued where 5 are counted. Where wanted, each program also leaves
the column sums of its tile of dq, or of dk and dv: added up in order they are the gradients of a projection's biases.

In a row whose softmax is nearly one-hot, dp and delta cancel. The roundings of out and lse, which 16-bit gradients do
not notice, are then most of an fp32 gradient's error; for it (WIDE) a first pass over the keys sums p and p * dp. The
first row of a document sees one key, where p = 1 and dp = delta. Its ds is p * (dp - dp): 0, or NaN as in torch.
"""

import triton
import triton.language as tl

from ._attention_fwd import _load_tile, _product, _rotate, _store_tile, _tile_and_head


@triton.jit
def _store_sums(sums_ptr, offs_d, x, valid):
    """The column sums of the `valid` rows of x."""
    tl.store(sums_ptr + offs_d, tl.sum(tl.where(valid[:, None], x, 0.0), 0))


@triton.jit
def _accumulate_dq(
    dq_main,
    dq_tail,
    q_main,
    q_tail,
    dout_main,
    dout_tail,
    lse,
    lse_low,
    sum_p,
    delta,
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
    WIDE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """dq += ds k over the key tiles [lo, hi), masked as in the forward's `_attend`; with SUMS instead the sums of p and
    p * dp by row. WIDE: lse comes in units of s, before scale_log2."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_main = tl.arange(0, D_MAIN)
    for start_n in tl.range(lo, hi, BLOCK_N):
        k_main = _load_tile(k_ptr, start_n, k_stride_t, offs_n, offs_main, hi, DIAGONAL)
        v_main = _load_tile(v_ptr, start_n, v_stride_t, offs_n, offs_main, hi, DIAGONAL)
        k_tail = k_main
        v_tail = v_main
        if D_TAIL > 0:
            offs_tail = D_MAIN + tl.arange(0, D_TAIL)
            k_tail = _load_tile(k_ptr, start_n, k_stride_t, offs_n, offs_tail, hi, DIAGONAL)
            v_tail = _load_tile(v_ptr, start_n, v_stride_t, offs_n, offs_tail, hi, DIAGONAL)
        s = _product(q_main, q_tail, k_main, k_tail, D_TAIL)
        dp = _product(dout_main, dout_tail, v_main, v_tail, D_TAIL)
        key = (start_n + offs_n)[None, :]
        if DIAGONAL:
            s = tl.where(key <= position[:, None], s, float("-inf"))
        if DOCUMENTS:
            s = tl.where(key >= doc_start[:, None], s, float("-inf"))
        if WIDE:
            s = (s - lse[:, None]) * scale_log2 - lse_low[:, None]
        else:
            s = s * scale_log2 - lse[:, None]
        p = tl.exp2(s)
        if SUMS:
            sum_p += tl.sum(p, 1)
            delta += tl.sum(p * dp, 1)
        else:
            if DIAGONAL:
                dp -= tl.where((position == doc_start)[:, None], dp, delta[:, None])
            else:
                dp -= delta[:, None]
            ds = (p * dp).to(k_main.dtype)
            dq_main = tl.dot(ds, k_main, dq_main, input_precision="ieee")
            if D_TAIL > 0:
                dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision="ieee")
    return dq_main, dq_tail, sum_p, delta


@triton.jit
def _accumulate_dq_of_row_tile(
    dq_main,
    dq_tail,
    q_main,
    q_tail,
    dout_main,
    dout_tail,
    lse,
    lse_low,
    sum_p,
    delta,
    k_ptr,
    v_ptr,
    k_stride_t,
    v_stride_t,
    lo,
    full_start,
    full_end,
    hi,
    position,
    doc_start,
    scale_log2,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WIDE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """`_accumulate_dq` over every visible key: where documents begin, the tiles without a mask, the diagonal."""
    if DOCUMENTS:
        dq_main, dq_tail, sum_p, delta = _accumulate_dq(
            dq_main, dq_tail, q_main, q_tail, dout_main, dout_tail, lse, lse_low, sum_p, delta, k_ptr, v_ptr,
            k_stride_t, v_stride_t, lo, full_start, position, doc_start, scale_log2, D_MAIN, D_TAIL, BLOCK_N, False,
            True, WIDE, SUMS,
        )  # fmt: skip
    dq_main, dq_tail, sum_p, delta = _accumulate_dq(
        dq_main, dq_tail, q_main, q_tail, dout_main, dout_tail, lse, lse_low, sum_p, delta, k_ptr, v_ptr, k_stride_t,
        v_stride_t, full_start, full_end, position, doc_start, scale_log2, D_MAIN, D_TAIL, BLOCK_N, False, False, WIDE,
        SUMS,
    )  # fmt: skip
    return _accumulate_dq(
        dq_main, dq_tail, q_main, q_tail, dout_main, dout_tail, lse, lse_low, sum_p, delta, k_ptr, v_ptr, k_stride_t,
        v_stride_t, full_end, hi, position, doc_start, scale_log2, D_MAIN, D_TAIL, BLOCK_N, True, DOCUMENTS, WIDE, SUMS,
    )  # fmt: skip


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    cos_ptr,
    sin_ptr,
    doc_start_ptr,
    dq_ptr,
    delta_ptr,
    sums_ptr,
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
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    dq_stride_b,
    dq_stride_t,
    dq_stride_h,
    B,
    T,
    H,
    scale,
    scale_log2,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
):
    """dq, and delta for the kernel of dk and dv, which runs after this one; sums [B, tiles, H, D] if given."""
    tiles = tl.cdiv(T, BLOCK_M)
    index, bh = _tile_and_head(tl.program_id(0), tiles, B * H, HEADS_PER_GROUP)
    start_m = (tiles - 1 - index) * BLOCK_M
    batch = tl.cast(bh // H, tl.int64)
    head = tl.cast(bh % H, tl.int64)
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    out_ptr += batch * out_stride_b + head * out_stride_h
    dout_ptr += batch * dout_stride_b + head * dout_stride_h
    dq_ptr += batch * dq_stride_b + head * dq_stride_h
    lse_ptr += tl.cast(bh, tl.int64) * T
    delta_ptr += tl.cast(bh, tl.int64) * T

    offs_m = tl.arange(0, BLOCK_M)
    offs_main = tl.arange(0, D_MAIN)
    mask_m = start_m + offs_m < T
    position = start_m + offs_m
    dout_main = _load_tile(dout_ptr, start_m, dout_stride_t, offs_m, offs_main, T, True)
    q_main = _load_tile(q_ptr, start_m, q_stride_t, offs_m, offs_main, T, True)
    dq_main = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
    dout_tail = dout_main
    q_tail = q_main
    dq_tail = dq_main
    if D_TAIL > 0:
        offs_tail = D_MAIN + tl.arange(0, D_TAIL)
        dout_tail = _load_tile(dout_ptr, start_m, dout_stride_t, offs_m, offs_tail, T, True)
        q_tail = _load_tile(q_ptr, start_m, q_stride_t, offs_m, offs_tail, T, True)
        dq_tail = tl.zeros([BLOCK_M, D_TAIL], tl.float32)
    # Beyond T, lse = inf makes p = 0.
    lse = tl.load(lse_ptr + start_m + offs_m, mask=mask_m, other=float("inf"))
    lse_low = tl.zeros([BLOCK_M], tl.float32)
    sum_p = tl.zeros([BLOCK_M], tl.float32)

    lo = 0
    full_start = 0
    full_end = (start_m + 1) // BLOCK_N * BLOCK_N
    hi = tl.minimum(start_m + BLOCK_M, T)
    doc_start = tl.zeros([BLOCK_M], tl.int32)
    if DOCUMENTS:
        doc_start_ptr += batch * T
        doc_start = tl.load(doc_start_ptr + start_m + offs_m, mask=mask_m, other=0)
        lo = tl.load(doc_start_ptr + start_m) // BLOCK_N * BLOCK_N
        last_start = tl.load(doc_start_ptr + hi - 1)
        full_end = tl.maximum(full_end, lo)
        full_start = tl.minimum(tl.cdiv(last_start, BLOCK_N) * BLOCK_N, full_end)

    delta = tl.zeros([BLOCK_M], tl.float32)
    if WIDE:
        lse /= scale_log2
        _, _, sum_p, delta = _accumulate_dq_of_row_tile(
            dq_main, dq_tail, q_main, q_tail, dout_main, dout_tail, lse, lse_low, sum_p, delta, k_ptr, v_ptr,
            k_stride_t, v_stride_t, lo, full_start, full_end, hi, position, doc_start, scale_log2, D_MAIN, D_TAIL,
            BLOCK_N, DOCUMENTS, WIDE, True,
        )  # fmt: skip
        sum_p = tl.where(mask_m, sum_p, 1.0)
        lse_low = tl.log2(sum_p)
        delta = delta / sum_p
        tl.store(delta_ptr + tl.cast(B * H, tl.int64) * T + start_m + offs_m, lse_low, mask=mask_m)
    else:
        out = _load_tile(out_ptr, start_m, out_stride_t, offs_m, offs_main, T, True)
        delta += tl.sum(out.to(tl.float32) * dout_main.to(tl.float32), 1)
        if D_TAIL > 0:
            out = _load_tile(out_ptr, start_m, out_stride_t, offs_m, offs_tail, T, True)
            delta += tl.sum(out.to(tl.float32) * dout_tail.to(tl.float32), 1)
    tl.store(delta_ptr + start_m + offs_m, delta, mask=mask_m)
    dq_main, dq_tail, _, _ = _accumulate_dq_of_row_tile(
        dq_main, dq_tail, q_main, q_tail, dout_main, dout_tail, lse, lse_low, sum_p, delta, k_ptr, v_ptr, k_stride_t,
        v_stride_t, lo, full_start, full_end, hi, position, doc_start, scale_log2, D_MAIN, D_TAIL, BLOCK_N, DOCUMENTS,
        WIDE, False,
    )  # fmt: skip

    dq_main *= scale
    dq_tail *= scale
    if R > 0:
        dq_main, dq_tail = _rotate(dq_main, dq_tail, position, mask_m, cos_ptr, sin_ptr, -1, PAIRS, R, D_MAIN, D_TAIL)
    _store_tile(dq_ptr, start_m, dq_stride_t, offs_m, offs_main, T, dq_main)
    if D_TAIL > 0:
        _store_tile(dq_ptr, start_m, dq_stride_t, offs_m, offs_tail, T, dq_tail)
    if sums_ptr is not None:
        sums_ptr += ((batch * tiles + start_m // BLOCK_M) * H + head) * (D_MAIN + D_TAIL)
        _store_sums(sums_ptr, offs_main, dq_main, mask_m)
        if D_TAIL > 0:
            _store_sums(sums_ptr, offs_tail, dq_tail, mask_m)


@triton.jit
def _accumulate_dkv(
    dk_main,
    dk_tail,
    dv_main,
    dv_tail,
    k_main,
    k_tail,
    v_main,
    v_tail,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    doc_start_ptr,
    q_stride_t,
    dout_stride_t,
    lo,
    hi,
    position,
    query_end,
    T,
    plane,
    scale_log2,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ENDS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dk += ds^T q and dv += p^T dout over the query tiles [lo, hi). DIAGONAL: a query may stand before a key. ENDS: it
    may stand at or past `query_end`, where the document of the key ends, or past T."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_main = tl.arange(0, D_MAIN)
    for start_m in tl.range(lo, hi, BLOCK_M):
        q_main = _load_tile(q_ptr, start_m, q_stride_t, offs_m, offs_main, T, ENDS)
        dout_main = _load_tile(dout_ptr, start_m, dout_stride_t, offs_m, offs_main, T, ENDS)
        q_tail = q_main
        dout_tail = dout_main
        if D_TAIL > 0:
            offs_tail = D_MAIN + tl.arange(0, D_TAIL)
            q_tail = _load_tile(q_ptr, start_m, q_stride_t, offs_m, offs_tail, T, ENDS)
            dout_tail = _load_tile(dout_ptr, start_m, dout_stride_t, offs_m, offs_tail, T, ENDS)
        if WIDE:  # the same bits as in the kernel of dq, whose sums lse_low and delta are
            s = tl.trans(_product(q_main, q_tail, k_main, k_tail, D_TAIL))
            dp = tl.trans(_product(dout_main, dout_tail, v_main, v_tail, D_TAIL))
        else:
            s = _product(k_main, k_tail, q_main, q_tail, D_TAIL)
            dp = _product(v_main, v_tail, dout_main, dout_tail, D_TAIL)
        query = start_m + offs_m
        if DIAGONAL:
            s = tl.where(query[None, :] >= position[:, None], s, float("-inf"))
        if ENDS:
            lse = tl.load(lse_ptr + query, mask=query < T, other=float("inf"))
            delta = tl.load(delta_ptr + query, mask=query < T, other=0.0)
            s = tl.where(query[None, :] < query_end[:, None], s, float("-inf"))
        else:
            lse = tl.load(lse_ptr + query)
            delta = tl.load(delta_ptr + query)
        if WIDE:
            lse_low = tl.load(delta_ptr + plane + query, mask=query < T, other=0.0)
            s = (s - (lse / scale_log2)[None, :]) * scale_log2 - lse_low[None, :]
        else:
            s = s * scale_log2 - lse[None, :]
        p = tl.exp2(s)
        p_low = p.to(dout_main.dtype)
        dv_main = tl.dot(p_low, dout_main, dv_main, input_precision="ieee")
        if DIAGONAL:
            start = query * 0
            if doc_start_ptr is not None:
                start = tl.load(doc_start_ptr + query, mask=query < T, other=0)
            dp -= tl.where((query == start)[None, :], dp, delta[None, :])
        else:
            dp -= delta[None, :]
        ds = (p * dp).to(q_main.dtype)
        dk_main = tl.dot(ds, q_main, dk_main, input_precision="ieee")
        if D_TAIL > 0:
            dv_tail = tl.dot(p_low, dout_tail, dv_tail, input_precision="ieee")
            dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision="ieee")
    return dk_main, dk_tail, dv_main, dv_tail


@triton.jit
def _attention_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    cos_ptr,
    sin_ptr,
    doc_start_ptr,
    doc_end_ptr,
    dk_ptr,
    dv_ptr,
    sums_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    dk_stride_b,
    dk_stride_t,
    dk_stride_h,
    dv_stride_b,
    dv_stride_t,
    dv_stride_h,
    B,
    T,
    H,
    scale,
    scale_log2,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
):
    """dk and dv, and sums [2, B, tiles, H, D] of both if given. EVEN_T: BLOCK_M divides T."""
    tiles = tl.cdiv(T, BLOCK_N)
    index, bh = _tile_and_head(tl.program_id(0), tiles, B * H, HEADS_PER_GROUP)
    start_n = index * BLOCK_N
    batch = tl.cast(bh // H, tl.int64)
    head = tl.cast(bh % H, tl.int64)
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    dout_ptr += batch * dout_stride_b + head * dout_stride_h
    dk_ptr += batch * dk_stride_b + head * dk_stride_h
    dv_ptr += batch * dv_stride_b + head * dv_stride_h
    lse_ptr += tl.cast(bh, tl.int64) * T
    delta_ptr += tl.cast(bh, tl.int64) * T

    offs_n = tl.arange(0, BLOCK_N)
    offs_main = tl.arange(0, D_MAIN)
    mask_n = start_n + offs_n < T
    position = start_n + offs_n
    k_main = _load_tile(k_ptr, start_n, k_stride_t, offs_n, offs_main, T, True)
    v_main = _load_tile(v_ptr, start_n, v_stride_t, offs_n, offs_main, T, True)
    dk_main = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
    dv_main = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
    k_tail = k_main
    v_tail = v_main
    dk_tail = dk_main
    dv_tail = dv_main
    if D_TAIL > 0:
        offs_tail = D_MAIN + tl.arange(0, D_TAIL)
        k_tail = _load_tile(k_ptr, start_n, k_stride_t, offs_n, offs_tail, T, True)
        v_tail = _load_tile(v_ptr, start_n, v_stride_t, offs_n, offs_tail, T, True)
        dk_tail = tl.zeros([BLOCK_N, D_TAIL], tl.float32)
        dv_tail = tl.zeros([BLOCK_N, D_TAIL], tl.float32)

    plane = tl.cast(B * H, tl.int64) * T
    lo = start_n // BLOCK_M * BLOCK_M
    hi = T
    full_end = T // BLOCK_M * BLOCK_M
    query_end = position * 0 + T
    if DOCUMENTS:
        doc_start_ptr += batch * T
        doc_end_ptr += batch * T
        query_end = tl.load(doc_end_ptr + position, mask=mask_n, other=0)
        hi = tl.load(doc_end_ptr + tl.minimum(start_n + BLOCK_N, T) - 1)
        full_end = tl.load(doc_end_ptr + start_n) // BLOCK_M * BLOCK_M
    ends: tl.constexpr = DOCUMENTS or not EVEN_T
    full_start = tl.minimum(tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M, hi)
    full_end = tl.maximum(full_start, full_end)
    dk_main, dk_tail, dv_main, dv_tail = _accumulate_dkv(
        dk_main, dk_tail, dv_main, dv_tail, k_main, k_tail, v_main, v_tail, q_ptr, dout_ptr, lse_ptr, delta_ptr,
        doc_start_ptr, q_stride_t, dout_stride_t, lo, full_start, position, query_end, T, plane, scale_log2, D_MAIN,
        D_TAIL, BLOCK_M, True, ends, WIDE,
    )  # fmt: skip
    dk_main, dk_tail, dv_main, dv_tail = _accumulate_dkv(
        dk_main, dk_tail, dv_main, dv_tail, k_main, k_tail, v_main, v_tail, q_ptr, dout_ptr, lse_ptr, delta_ptr,
        doc_start_ptr, q_stride_t, dout_stride_t, full_start, full_end, position, query_end, T, plane, scale_log2,
        D_MAIN, D_TAIL, BLOCK_M, False, False, WIDE,
    )  # fmt: skip
    if ends:
        dk_main, dk_tail, dv_main, dv_tail = _accumulate_dkv(
            dk_main, dk_tail, dv_main, dv_tail, k_main, k_tail, v_main, v_tail, q_ptr, dout_ptr, lse_ptr, delta_ptr,
            doc_start_ptr, q_stride_t, dout_stride_t, full_end, hi, position, query_end, T, plane, scale_log2, D_MAIN,
            D_TAIL, BLOCK_M, False, True, WIDE,
        )  # fmt: skip

    dk_main *= scale
    dk_tail *= scale
    if R > 0:
        dk_main, dk_tail = _rotate(dk_main, dk_tail, position, mask_n, cos_ptr, sin_ptr, -1, PAIRS, R, D_MAIN, D_TAIL)
    _store_tile(dk_ptr, start_n, dk_stride_t, offs_n, offs_main, T, dk_main)
    _store_tile(dv_ptr, start_n, dv_stride_t, offs_n, offs_main, T, dv_main)
    if D_TAIL > 0:
        _store_tile(dk_ptr, start_n, dk_stride_t, offs_n, offs_tail, T, dk_tail)
        _store_tile(dv_ptr, start_n, dv_stride_t, offs_n, offs_tail, T, dv_tail)
    if sums_ptr is not None:
        D: tl.constexpr = D_MAIN + D_TAIL
        sums_ptr += ((batch * tiles + index) * H + head) * D
        dv_sums_ptr = sums_ptr + tl.cast(B * H, tl.int64) * tiles * D
        _store_sums(sums_ptr, offs_main, dk_main, mask_n)
        _store_sums(dv_sums_ptr, offs_main, dv_main, mask_n)
        if D_TAIL > 0:
            _store_sums(sums_ptr, offs_tail, dk_tail, mask_n)
            _store_sums(dv_sums_ptr, offs_tail, dv_tail, mask_n)

"""Device code of decode.py's attention: one query a row over what its slot of the cache holds, split along S.

Programs are (head, split, row). A split is SPLIT positions wherever a row ends, so a row's sums do not depend on other
rows nor on the cache's capacity; splits past a row's end leave at once. A head's D columns are held as [main | tail],
two powers of two (80 = 64 + 16), so that no column is loaded in vain.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

COMBINED = tl.constexpr(16)  # splits that the last program takes at a time


@triton.jit
def _combine(part_ptr, stats_ptr, offs_d, mask_d, splits, D: tl.constexpr):
    """The normalised columns `offs_d` of all splits' partial results, in the order of the splits."""
    acc = tl.zeros([offs_d.shape[0]], tl.float32)
    m_i = tl.full([1], float("-inf"), tl.float32)
    l_i = tl.zeros([1], tl.float32)
    for start in range(0, splits, COMBINED):
        offs_s = start + tl.arange(0, COMBINED)
        mask_s = offs_s < splits
        m = tl.load(stats_ptr + 2 * offs_s, mask=mask_s, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(stats_ptr + 2 * offs_s + 1, mask=mask_s, other=0.0, cache_modifier=".cg")
        ptrs = part_ptr + offs_s[:, None].to(tl.int64) * D + offs_d[None, :]
        part = tl.load(ptrs, mask=mask_s[:, None] & mask_d[None, :], other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m_i, tl.max(m, 0))
        alpha, weight = tl.exp2(m_i - m_new), tl.exp2(m - m_new)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        l_i = l_i * alpha + tl.sum(total * weight, 0)
        m_i = m_new
    return acc / l_i


@triton.jit
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, slot_ptr, out_ptr, partial_ptr, counter_ptr,
    q_stride_b, cache_stride_row, cache_stride_s, out_stride_b,
    qk_scale, H, capacity,
    LONGER: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [row, head] over the first length + LONGER positions of the slot; `qk_scale` includes log2(e).

    partial [B, H, capacity, D + 2] fp32 takes each split's unnormalised result, then each split's maximum and sum.
    """
    head, split, row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(length_ptr + row).to(tl.int32) + LONGER
    start = split * SPLIT
    if start >= length:
        return
    slot = row
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + row)
    offs_n = start + tl.arange(0, SPLIT)
    mask_n = offs_n < length
    cached = slot * cache_stride_row + head * D + offs_n[:, None].to(tl.int64) * cache_stride_s
    offs_main = tl.arange(0, D_MAIN)
    q_row = q_ptr + row * q_stride_b + head * D

    k = tl.load(k_ptr + cached + offs_main[None, :], mask=mask_n[:, None], other=0.0, eviction_policy="evict_first")
    v = tl.load(v_ptr + cached + offs_main[None, :], mask=mask_n[:, None], other=0.0, eviction_policy="evict_first")
    scores = tl.sum(k.to(tl.float32) * tl.load(q_row + offs_main).to(tl.float32)[None, :], 1)
    if D_TAIL > 0:
        offs_tail = D_MAIN + tl.arange(0, D_TAIL)
        mask_tail = offs_tail < D
        mask = mask_n[:, None] & mask_tail[None, :]
        k_tail = tl.load(k_ptr + cached + offs_tail[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        v_tail = tl.load(v_ptr + cached + offs_tail[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        q_tail = tl.load(q_row + offs_tail, mask=mask_tail, other=0.0).to(tl.float32)
        tail = tl.sum(k_tail.to(tl.float32) * q_tail[None, :], 1)
        scores += tl.reshape(tail, [SPLIT])
    scores = tl.where(mask_n, scores * qk_scale, float("-inf"))
    m_i = tl.max(scores, 0)
    p = tl.exp2(scores - m_i)

    place = (row * H + head) * capacity
    part_ptr = partial_ptr + place * (D + 2)
    stats_ptr = part_ptr + capacity * D
    mine = part_ptr + split.to(tl.int64) * D
    tl.store(mine + offs_main, tl.sum(p[:, None] * v.to(tl.float32), 0))
    if D_TAIL > 0:
        tl.store(mine + offs_tail, tl.sum(p[:, None] * v_tail.to(tl.float32), 0), mask=mask_tail)
    tl.store(stats_ptr + 2 * split, m_i)
    tl.store(stats_ptr + 2 * split + 1, tl.sum(p, 0))
    tl.debug_barrier()  # all of the program's stores, not one thread's alone, come before its count

    splits = tl.cdiv(length, SPLIT)
    if tl.atomic_add(counter_ptr + row * H + head, 1, sem="acq_rel", scope="gpu") == splits - 1:
        out_row = out_ptr + row * out_stride_b + head * D
        out = _combine(part_ptr, stats_ptr, offs_main, offs_main < D, splits, D)
        tl.store(out_row + offs_main, out.to(out_ptr.dtype.element_ty))
        if D_TAIL > 0:
            out = _combine(part_ptr, stats_ptr, offs_tail, mask_tail, splits, D)
            tl.store(out_row + offs_tail, out.to(out_ptr.dtype.element_ty), mask=mask_tail)

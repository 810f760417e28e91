"""Causal attention with partial rotary embedding.

    out[t] = sum_s p[t, s] v[s]      p[t] = softmax over the visible s of scale * q[t] . k[s]      scale: D ** -0.5

Query t stands at position q_start + t, key s at position s; a query sees the keys up to its own position, and with
segment_ids only those of its own document, the run of equal ids that it stands in. With cos, sin the first
R = 2 * cos.shape[1] dims of q and k are rotated first (rotate-half: dim i pairs with i + R/2).

Shapes    q, out [B, T, H, D]   k, v [B, S, H, D], S >= q_start + T   cos, sin [>= q_start + T, R/2] fp32
          segment_ids [B, S] int   lse [B, H, T] fp32: log2 of the sum of 2 ** (log2(e) * scale * q k^T)
          bounds [2, B, S] int32: first position of each position's document, and the one past its last
Saves     q, k, v, out, lse, and cos, sin, bounds if given
Numerics  scores, softmax, accumulation and rotation in fp32; rotated q and k, probabilities and ds rounded to the dtype
          of q before they enter a product. NaN and infinity reach what can see them; those of v also earlier rows of
          their tile, through 0 * NaN (in torch all earlier rows).
Limits    Triton: D in 16, 32, 48, 64, 80, 96, 128; last axes contiguous, other strides free
          Gradients: q_start = 0, T = S
Source    Dao 2023, arXiv:2307.08691 (flash attention); Su et al. 2021, arXiv:2104.09864 (rotary embedding)
"""

import math

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ._attention_bwd import _attention_bwd_dkv_kernel, _attention_bwd_dq_kernel
from ._attention_fwd import _attention_fwd_kernel, _attention_rotate_kernel
from ._host import kernel_op, use_triton
from ._tuning import AttentionConfig, arch_of, choose_attention

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CPU_BLOCK = 64  # queries at a time in a CPU's backward, whose scores then stay in its cache
MAX_STRIDE_T = 2**23  # offsets between tiles are 64-bit, those within a tile of at most 256 rows 32-bit


def rotate_half_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] with its first R dims rotated by cos, sin [T, R/2]: (x1 cos - x2 sin, x2 cos + x1 sin)."""
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([(x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest], dim=-1)


def document_bounds(segment_ids: Tensor) -> Tensor:
    """`bounds` of segment_ids [B, S]: where the run of equal ids around each position starts, and where it ends."""
    B, S = segment_ids.shape
    position = torch.arange(S, dtype=torch.int32, device=segment_ids.device)
    edge = torch.ones(B, 1, dtype=torch.bool, device=segment_ids.device)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = torch.where(torch.cat([edge, change], dim=1)[:, :S], position, 0).cummax(dim=1).values
    end = torch.where(torch.cat([change, edge], dim=1)[:, :S], position + 1, S).flip(1).cummin(dim=1).values.flip(1)
    return torch.stack([start, end])


def visible_keys(T: int, S: int, q_start: int, segment_ids: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query may see: bool [T, S], or [B, 1, T, S] with segment_ids [B, >= S]."""
    key = torch.arange(S, device=device)
    mask = torch.arange(q_start, q_start + T, device=device)[:, None] >= key
    if segment_ids is not None:
        mask = mask & (document_bounds(segment_ids)[0, :, None, q_start : q_start + T, None] <= key)
    return mask


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    q_start: int = 0,
) -> Tensor:
    """The specification, in the dtype of `q`. Shapes as in the module's docstring."""
    T, S = q.shape[1], q_start + q.shape[1]
    k, v = k[:, :S], v[:, :S]
    if cos is not None:
        q = rotate_half_ref(q, cos[q_start:S], sin[q_start:S])
        k = rotate_half_ref(k, cos[:S], sin[:S])
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~visible_keys(T, S, q_start, segment_ids, q.device), float("-inf"))
    p = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("bhts,bshd->bthd", p, v)


class _AttentionCpu(torch.autograd.Function):
    """SDPA of q, k, v [B, H, T or S, D] in the forward, a backward of our own: SDPA's takes delta from the rounded out,
    which misses the numerics rule where a query sees few keys. Blocks of queries see no key past their last query.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        *inputs, mask = ctx.saved_tensors
        B, H, T, D = dout.shape
        wide = torch.promote_types(dout.dtype, torch.float32)
        q, k, v, dout = (x.to(wide).reshape(B * H, T, D) for x in (*inputs, dout))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        future = torch.ones(CPU_BLOCK, CPU_BLOCK, dtype=torch.bool).triu(1)
        for start in range(0, T, CPU_BLOCK):
            end = min(T, start + CPU_BLOCK)
            rows, keys = slice(start, end), slice(0, end)
            s = torch.bmm(q[:, rows], k[:, keys].mT).mul_(ctx.scale)
            if mask is None:
                s[:, :, rows].masked_fill_(future[: end - start, : end - start], float("-inf"))
            else:
                s.view(B, H, end - start, end).masked_fill_(~mask[..., rows, keys], float("-inf"))
            p = s.softmax(dim=-1)
            dv[:, keys].baddbmm_(p.mT, dout[:, rows])
            ds = torch._softmax_backward_data(torch.bmm(dout[:, rows], v[:, keys].mT), p, -1, wide).mul_(ctx.scale)
            dq[:, rows] = torch.bmm(ds, k[:, keys])
            dk[:, keys].baddbmm_(ds.mT, q[:, rows])
        return *(x.view(B, H, T, D).to(y.dtype) for x, y in zip((dq, dk, dv), inputs, strict=True)), None, None


def _attention_cpu(q, k, v, cos, sin, scale, segment_ids, q_start) -> Tensor:
    T, S = q.shape[1], q_start + q.shape[1]
    k, v = k[:, :S], v[:, :S]
    if cos is not None:
        q = rotate_half_ref(q, cos[q_start:S], sin[q_start:S])
        k = rotate_half_ref(k, cos[:S], sin[:S])
    plain = q_start == 0 and segment_ids is None
    mask = None if plain else visible_keys(T, S, q_start, segment_ids, q.device)
    return _AttentionCpu.apply(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale).transpose(1, 2)


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _split(D: int) -> tuple[int, int]:
    """D as a power of two and the rest, which is 0 or a power of two for D in HEAD_DIMS."""
    main = 1 << (D.bit_length() - 1)
    return main, D - main


def _config(kernel: str, q: Tensor) -> AttentionConfig:
    return choose_attention(kernel, q.shape[-1], q.dtype, arch_of(q.device))


def _tiles(config: AttentionConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HEADS_PER_GROUP": config.heads_per_group,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


@kernel_op(mutates=("out",))
def _attention_rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """out = x [B, T, H, D] with its first R dims rotated by the first T rows of cos, sin."""
    B, T, H, D = x.shape
    if x.numel() == 0:
        return
    main, tail = _split(D)
    _attention_rotate_kernel[(triton.cdiv(T, 64) * B * H,)](
        x, cos, sin, out, *_strides(x), *_strides(out), T, H,
        R=2 * cos.shape[-1], D_MAIN=main, D_TAIL=tail, BLOCK_T=64, num_warps=4,
    )  # fmt: skip


@kernel_op(mutates=("out", "copy", "lse"))
def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, bounds: Tensor | None, out: Tensor,
    copy: Tensor | None, lse: Tensor, scale: float, q_start: int,
) -> None:  # fmt: skip
    """out (and copy, if given) and lse; k comes rotated, q is rotated if cos, sin are given."""
    B, T, H, D = q.shape
    if q.numel() == 0:
        return
    config = _config("fwd", q)
    main, tail = _split(D)
    _attention_fwd_kernel[(triton.cdiv(T, config.block_m) * B * H,)](
        q, k, v, cos, sin, bounds, out, copy, lse,
        *_strides(q), *_strides(k), *_strides(v), *_strides(out), *_strides(copy),
        0 if bounds is None else bounds.stride(1), B, T, H, q_start, scale * math.log2(math.e),
        R=0 if cos is None else 2 * cos.shape[-1], D_MAIN=main, D_TAIL=tail, DOCUMENTS=bounds is not None,
        DIAGONAL_N=config.diagonal_n or config.block_n, **_tiles(config),
    )  # fmt: skip


def backward_tiles(q: Tensor) -> tuple[int, int]:
    """How many tiles of queries and of keys the backward of q [B, T, H, D] takes, all sequences together."""
    B, T = q.shape[:2]
    tiles_q = triton.cdiv(T, _config("bwd_dq", q).block_m)
    tiles_k = triton.cdiv(T, _config("bwd_dkv", q).block_n)
    return B * tiles_q, B * tiles_k


@kernel_op(mutates=("dq", "dk", "dv", "delta", "dq_sums", "dkv_sums"))
def _attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, cos: Tensor | None, sin: Tensor | None,
    bounds: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, delta: Tensor, dq_sums: Tensor | None,
    dkv_sums: Tensor | None, scale: float, pairs: bool,
) -> None:  # fmt: skip
    """dq, dk, dv; delta [2, B, H, T] fp32 is scratch. q, k come rotated; cos, sin, if given, rotate dq, dk back, by
    neighbouring pairs if `pairs`. dq_sums [tiles, H D], dkv_sums [2, tiles, H D] fp32, if given, get the column sums
    of each of `backward_tiles`.
    """
    B, T, H, D = q.shape
    if q.numel() == 0:
        return
    scale_log2 = scale * math.log2(math.e)
    main, tail = _split(D)
    constants = {
        "R": 0 if cos is None else 2 * cos.shape[-1],
        "PAIRS": pairs,
        "D_MAIN": main,
        "D_TAIL": tail,
        "DOCUMENTS": bounds is not None,
        "WIDE": q.dtype == torch.float32,
    }
    start, end = (None, None) if bounds is None else bounds
    config = _config("bwd_dq", q)
    _attention_bwd_dq_kernel[(triton.cdiv(T, config.block_m) * B * H,)](
        q, k, v, out, dout, lse, cos, sin, start, dq, delta, dq_sums,
        *_strides(q), *_strides(k), *_strides(v), *_strides(out), *_strides(dout), *_strides(dq),
        B, T, H, scale, scale_log2, **constants, **_tiles(config),
    )  # fmt: skip
    config = _config("bwd_dkv", q)
    _attention_bwd_dkv_kernel[(triton.cdiv(T, config.block_n) * B * H,)](
        q, k, v, dout, lse, delta, cos, sin, start, end, dk, dv, dkv_sums,
        *_strides(q), *_strides(k), *_strides(v), *_strides(dout), *_strides(dk), *_strides(dv),
        B, T, H, scale, scale_log2, EVEN_T=T % config.block_m == 0, **constants, **_tiles(config),
    )  # fmt: skip


def _rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is None:
        return x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _attention_rotate(x, cos, sin, out)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin, bounds, scale, q_start):
        B, T, H, _ = q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(B, H, T, dtype=torch.float32)
        _attention_fwd(q, _rotated(k, cos, sin), v, cos, sin, bounds, out, None, lse, scale, q_start)
        ctx.save_for_backward(q, k, v, out, lse, cos, sin, bounds)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse, cos, sin, bounds = ctx.saved_tensors
        if dout.stride(-1) != 1 or dout.stride(1) >= MAX_STRIDE_T:
            dout = dout.contiguous()
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        delta = lse.new_empty(2, *lse.shape)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        _attention_bwd(
            q, k, v, out, dout, lse, cos, sin, bounds, dq, dk, dv, delta, None, None, ctx.scale, False
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None, None


def _check_arguments(q, k, v, cos, sin, scale, segment_ids, q_start) -> None:
    def refuse(name: str, expected: str, got: object):
        raise ValueError(f"attention: expected {name} {expected}, got {got}")

    if q.dim() != 4:
        refuse("q", "[B, T, H, D]", list(q.shape))
    B, T, H, D = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (B, H, D) or x.shape[1] != k.shape[1]:
            refuse(name, f"[{B}, {k.shape[1] if name == 'v' else 'S'}, {H}, {D}]", list(x.shape))
        if x.dtype != q.dtype:
            refuse(name, f"of q's dtype {q.dtype}", x.dtype)
    S = k.shape[1]
    if q_start < 0 or S < q_start + T:
        refuse("q_start", f"0 or more and q_start + T <= S with T = {T}, S = {S}", q_start)
    if (q_start != 0 or S != T) and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        refuse("q_start", "= 0 and T = S where gradients are wanted", f"q_start = {q_start}, T = {T}, S = {S}")
    if scale is not None and not 0 < scale < math.inf:
        refuse("scale", "> 0", scale)
    if (cos is None) != (sin is None):
        refuse("cos and sin", "both or neither", "one of them")
    for name, x in (("cos", cos), ("sin", sin)):
        if x is None:
            continue
        if x.dim() != 2 or x.shape != cos.shape or x.shape[0] < q_start + T or 2 * x.shape[1] > D:
            refuse(name, f"[>= {q_start + T}, R/2] like the other, with R at most {D}", list(x.shape))
        if x.dtype != torch.float32 and q.dtype != torch.float64:
            refuse(name, "of torch.float32", x.dtype)
    if segment_ids is not None:
        if segment_ids.shape != (B, S):
            refuse("segment_ids", f"[{B}, {S}]", list(segment_ids.shape))
        if segment_ids.is_floating_point():
            refuse("segment_ids", "of integers", segment_ids.dtype)
    for name, x in (("k", k), ("v", v), ("cos", cos), ("sin", sin), ("segment_ids", segment_ids)):
        if x is not None and x.device != q.device:
            refuse(name, f"on q's device {q.device}", x.device)


def _check_triton_limits(q, k, v) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"attention: expected q of one of {DTYPES}, got {q.dtype}")
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"attention: expected q with D in {HEAD_DIMS}, got {q.shape[-1]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 or x.stride(1) >= MAX_STRIDE_T:
            limits = f"a contiguous last axis and a stride below {MAX_STRIDE_T} along T"
            raise ValueError(f"attention: expected {name} with {limits}, got strides {x.stride()}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    q_start: int = 0,
) -> Tensor:
    """Causal attention of q [B, T, H, D] over k, v [B, S, H, D]; returns [B, T, H, D]. The module's docstring has more.

    Raises ValueError naming the argument whose shape, dtype, device or value does not fit.
    """
    _check_arguments(q, k, v, cos, sin, scale, segment_ids, q_start)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not use_triton(q):
        return _attention_cpu(q, k, v, cos, sin, scale, segment_ids, q_start)
    _check_triton_limits(q, k, v)
    if cos is not None and cos.shape[1] == 0:
        cos = sin = None
    if cos is not None:
        k, cos, sin = k[:, : q_start + q.shape[1]], cos.contiguous(), sin.contiguous()
    bounds = None if segment_ids is None else document_bounds(segment_ids)
    return _Attention.apply(q, k, v, cos, sin, bounds, scale, q_start)

"""One Phi layer: attention and MLP in parallel off one LayerNorm, with fused weights.

    p = layer_norm(x) w_in^T + b_in                    columns [q | k | v | h], in the order below
    z = [attention(q, k, v) | gelu(h)]                 [N, C + F]
    y = x + z w_out^T + b_out[0] + b_out[1]

Rows of w_in and b_in, and so columns of p: q [H, D] | k [H, D] | v [H, D] | h [F]. Inside each head of q and k the R
rotary dims come as neighbouring pairs: row 2i of a head is its dim i, row 2i+1 its dim i + R/2, the others stay. A GEMM
tile of whole pairs can so rotate its own columns, and q.k does not change when both are permuted alike.

Shapes    x, y [B, T, C]   ln_w, ln_b [C]   w_in [3C+F, C]   b_in [3C+F]   w_out [C, C+F]
          b_out [2, C]: attention, MLP
          cos, sin [S, R/2] fp32   segment_ids [B, T], or document_bounds of them [2, B, T]   cache k, v [B, S, H, D]
Saves     x, p (q and k rotated, h before its GELU), attention's output and lse, mean, rstd: at C = 2560, H = 32 and
          F = 10240 in bf16 46,216 bytes a token. With `recompute` 10,376: all but p, for one GEMM more
Backward  dz = dy w_out, whose gelu' epilogue also recomputes gelu(h); attention's backward, into the same buffer
          dp [N, 3C+F], with dq and dk rotated back; dw_in = dp^T layer_norm(x) and dx = dp w_in in one product each;
          dw_out in two. db_in adds up column sums that the kernels leave by tiles of rows, always in the same order
Numerics  layer_norm.py, gemm.py, attention.py. In Triton autocast changes nothing: all is in x's dtype, as it comes
Limits    Triton: one dtype out of fp32, fp16, bf16; last axes and biases that are not contiguous are copied
Source    Wang, Komatsuzaki 2021 (GPT-J) for the parallel layer; Li et al. 2023, arXiv:2309.05463 (phi-1.5)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cpu import Weight, linear, weight_shape
from ._host import as_rows, check, check_dtypes, use_triton
from .attention import _attention_bwd, _attention_fwd, attention, attention_ref, backward_tiles, document_bounds
from .gemm import _project_in, _project_out, _project_out_bwd, _weight_gradients, dgelu_row_tiles
from .layer_norm import layer_norm, layer_norm_backward, layer_norm_forward, layer_norm_ref
from .quantized import QuantizedWeight, dequantize


def rotate_pairs_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of x [B, T, H, R] by cos, sin [T, R/2]."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(-2).to(x.dtype)


def split_projection(p: Tensor, C: int, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p [B, T, 3C+F] -> rotated q and k, v [B, T, H, D], and h [B, T, F]; cos, sin [T, R/2]: p's positions."""
    R = 2 * cos.shape[-1]
    q, k, v, h = p.split([C, C, C, p.shape[-1] - 3 * C], dim=-1)
    q, k, v = (t.unflatten(-1, (heads, C // heads)) for t in (q, k, v))
    q, k = (torch.cat([rotate_pairs_ref(t[..., :R], cos, sin), t[..., R:]], dim=-1) for t in (q, k))
    return q, k, v, h


def parallel_block_ref(
    x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, *, heads, eps=1e-5, segment_ids=None
) -> Tensor:
    """The specification, in the dtype of `x`. Shapes as in the module's docstring."""
    T, C = x.shape[1:]
    p = F.linear(layer_norm_ref(x, ln_w, ln_b, eps), w_in, b_in)
    q, k, v, h = split_projection(p, C, heads, cos[:T], sin[:T])
    z = torch.cat([attention_ref(q, k, v, segment_ids=segment_ids).flatten(2), F.gelu(h, approximate="tanh")], dim=-1)
    return x + F.linear(z, w_out) + b_out[0] + b_out[1]


def _views(p: Tensor, B: int, T: int, heads: int, C: int) -> list[Tensor]:
    """q, k, v [B, T, H, D] of p [N, 3C+F]."""
    return [p[:, i * C : (i + 1) * C].view(B, T, heads, C // heads) for i in range(3)]


def _project(x, ln_w, ln_b, w_in, b_in, cos, sin, heads, eps, q_start, z) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """layer_norm(x), p, mean, rstd; gelu(h) goes into the last columns of z."""
    N, (T, C) = x.shape[0] * x.shape[1], x.shape[1:]
    y, mean, rstd = layer_norm_forward(x, ln_w, ln_b, eps)
    p = x.new_empty(N, w_in.shape[0])
    _project_in(y.view(N, C), as_rows(w_in), b_in.contiguous(), cos, sin, p, z, heads, T, q_start)
    return y, p, mean, rstd


class _ParallelBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, bounds, heads, eps, recompute):
        B, T, C = x.shape
        z = x.new_empty(B * T, w_out.shape[1])
        _, p, mean, rstd = _project(x, ln_w, ln_b, w_in, b_in, cos, sin, heads, eps, 0, z)
        q, k, v = _views(p, B, T, heads, C)
        attn = torch.empty(q.shape, dtype=x.dtype, device=x.device)
        lse = torch.empty(B, heads, T, dtype=torch.float32, device=x.device)
        copy = z[:, :C].view(q.shape)
        _attention_fwd(q, k, v, None, None, bounds, attn, copy, lse, (C // heads) ** -0.5, 0)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _project_out(z, as_rows(w_out), b_out.contiguous(), as_rows(x), out.view(-1, C))
        kept = (x, ln_w, ln_b, w_in, b_in, w_out, cos, sin, bounds, mean, rstd, attn, lse)
        ctx.save_for_backward(*kept, None if recompute else p)
        ctx.heads, ctx.eps = heads, eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, ln_w, ln_b, w_in, b_in, w_out, cos, sin, bounds, mean, rstd, attn, lse, p = ctx.saved_tensors
        heads, (B, T, C), F = ctx.heads, x.shape, w_out.shape[1] - x.shape[2]
        dy, N = as_rows(dout), B * T
        dattn, dp, g = x.new_empty(N, C), x.new_empty(N, 3 * C + F), x.new_empty(N, F)
        if p is None:
            z = x.new_empty(N, C + F)
            y, p, _, _ = _project(x, ln_w, ln_b, w_in, b_in, cos, sin, heads, ctx.eps, 0, z)
        else:
            y, _, _ = layer_norm_forward(x, ln_w, ln_b, ctx.eps)
        dh_sums = x.new_empty(dgelu_row_tiles(dy, F), F, dtype=torch.float32)
        _project_out_bwd(dy, as_rows(w_out), p[:, 3 * C :], dattn, dp[:, 3 * C :], g, dh_sums)
        dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
        q, k, v = _views(p, B, T, heads, C)
        dq, dk, dv = _views(dp, B, T, heads, C)
        tiles_q, tiles_k = backward_tiles(q)
        dq_sums, dkv_sums = lse.new_empty(tiles_q, C), lse.new_empty(2, tiles_k, C)
        _attention_bwd(
            q, k, v, attn, dattn.view(q.shape), lse, cos, sin, bounds, dq, dk, dv, lse.new_empty(2, *lse.shape),
            dq_sums, dkv_sums, (C // heads) ** -0.5, True,
        )  # fmt: skip
        _weight_gradients(dy, attn.view(N, C), g, dp, y.view(N, C), dw_out, dw_in)
        db_in = torch.cat([dq_sums.sum(0), *dkv_sums.sum(1), dh_sums.sum(0)]).to(b_in.dtype)
        db_out = dy.sum(0, dtype=torch.float32).to(b_in.dtype).expand(2, C).contiguous()
        dnorm = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.mm(dp, w_in, out=dnorm.view(N, C))  # with an out, autocast leaves it alone
        dx, dln_w, dln_b = layer_norm_backward(dnorm, x, ln_w, mean, rstd, dy.view(x.shape))
        return dx, dln_w, dln_b, dw_in, db_in, dw_out, db_out, None, None, None, None, None, None


def _parallel_block_cpu(x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, heads, eps, bounds, cache, q_start):
    T, C = x.shape[1:]
    p = linear(layer_norm(x, ln_w, ln_b, eps), w_in, b_in)
    q, k, v, h = split_projection(p, C, heads, cos[q_start : q_start + T], sin[q_start : q_start + T])
    if cache is not None:
        cache[0][:, q_start : q_start + T] = k
        cache[1][:, q_start : q_start + T] = v
        k, v = (c[:, : q_start + T] for c in cache)
    # Where its document starts is as good a name of a segment as any.
    attn = attention(q, k, v, segment_ids=None if bounds is None else bounds[0], q_start=q_start)
    z = torch.cat([attn.flatten(2), F.gelu(h, approximate="tanh")], dim=-1)
    return x + linear(z, w_out, b_out[0] + b_out[1])


def _prefill(x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, heads, eps, cache, q_start) -> Tensor:
    """The layer with a cache of keys and values, in Triton: nothing is saved."""
    B, T, C = x.shape
    z = x.new_empty(B * T, w_out.shape[1])
    _, p, _, _ = _project(x, ln_w, ln_b, w_in, b_in, cos, sin, heads, eps, q_start, z)
    q, k, v = _views(p, B, T, heads, C)
    cache[0][:, q_start : q_start + T] = k
    cache[1][:, q_start : q_start + T] = v
    lse = torch.empty(B, heads, T, dtype=torch.float32, device=x.device)
    keys, values = (c[:, : q_start + T] for c in cache)
    scale = (C // heads) ** -0.5
    _attention_fwd(q, keys, values, None, None, None, z[:, :C].view(q.shape), None, lse, scale, q_start)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _project_out(z, as_rows(w_out), b_out.contiguous(), as_rows(x), out.view(-1, C))
    return out


def _check_shapes(x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, heads, segment_ids, cache, q_start) -> None:
    def expect_shape(name: str, found: torch.Size, *shape: int):
        check(found == shape, f"parallel_block: expected {name} {list(shape)}, got {list(found)}")

    def expect(name: str, tensor: Tensor, *shape: int):
        expect_shape(name, tensor.shape, *shape)

    check(x.dim() == 3, f"parallel_block: expected x [B, T, C], got {list(x.shape)}")
    (B, T, C), F = x.shape, weight_shape(w_in)[0] - 3 * x.shape[2]
    check(heads > 0 and C % heads == 0, f"parallel_block: expected heads that divide C = {C}, got {heads}")
    expect("ln_w", ln_w, C)
    expect("ln_b", ln_b, C)
    check(F > 0, f"parallel_block: expected w_in [3C+F, C] with C = {C}, got {list(weight_shape(w_in))}")
    expect_shape("w_in", weight_shape(w_in), 3 * C + F, C)
    expect("b_in", b_in, 3 * C + F)
    expect_shape("w_out", weight_shape(w_out), C, C + F)
    expect("b_out", b_out, 2, C)
    D, R = C // heads, 2 * cos.shape[-1]
    check(cos.dim() == 2 and R <= D, f"parallel_block: expected cos [S, R/2] with R at most {D}, got {list(cos.shape)}")
    check(len(cos) >= q_start + T, f"parallel_block: expected cos for {q_start + T} positions, got {len(cos)}")
    expect("sin", sin, *cos.shape)
    if segment_ids is not None:
        expect("segment_ids", segment_ids, *((2, B, T) if segment_ids.dim() == 3 else (B, T)))
        check(cache is None, "parallel_block: expected no segment_ids with a cache, got both")
    if cache is not None:
        for name, tensor in zip(("cache k", "cache v"), cache, strict=True):
            expect(name, tensor, B, cache[0].shape[1], heads, D)
        room = cache[0].shape[1]
        check(room >= q_start + T, f"parallel_block: expected a cache of {q_start + T} positions, got {room}")
    else:
        check(q_start == 0, f"parallel_block: expected q_start 0 without a cache, got {q_start}")


def parallel_block(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Weight,
    b_in: Tensor,
    w_out: Weight,
    b_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    eps: float = 1e-5,
    segment_ids: Tensor | None = None,
    cache: tuple[Tensor, Tensor] | None = None,
    q_start: int = 0,
    recompute: bool = False,
) -> Tensor:
    """One layer of x [B, T, C] at positions q_start.. q_start+T-1; returns [B, T, C]. Shapes as in the docstring above.

    With `cache` = (k, v) [B, S, H, D] the rotated keys and the values are written at those positions, and attention
    reads everything up to them (chunked prefill, no gradients). A model of many layers makes `document_bounds` once for
    all. `recompute` makes q, k, v and h anew in the backward instead of keeping them. Raises ValueError naming the
    argument that does not fit.
    """
    weights = (ln_w, ln_b, w_in, b_in, w_out, b_out)
    _check_shapes(x, *weights, cos, sin, heads, segment_ids, cache, q_start)
    bounds = segment_ids
    if segment_ids is not None and segment_ids.dim() == 2:
        bounds = document_bounds(segment_ids)
    if not use_triton(x):
        return _parallel_block_cpu(x, *weights, cos, sin, heads, eps, bounds, cache, q_start)
    # A layer's worth at a time, for products at their usual speed: many rows share the cost.
    w_in, w_out = (dequantize(w, x.dtype) if isinstance(w, QuantizedWeight) else w for w in (w_in, w_out))
    weights = (ln_w, ln_b, w_in, b_in, w_out, b_out)
    check_dtypes("parallel_block", x=x, ln_w=ln_w, ln_b=ln_b, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out)
    for name, table in (("cos", cos), ("sin", sin)):
        check(table.dtype == torch.float32, f"parallel_block: expected {name} in torch.float32, got {table.dtype}")
    cos, sin = cos.contiguous(), sin.contiguous()
    if cache is not None:
        return _prefill(x, *weights, cos, sin, heads, eps, cache, q_start)
    return _ParallelBlock.apply(x, *weights, cos, sin, bounds, heads, eps, recompute)

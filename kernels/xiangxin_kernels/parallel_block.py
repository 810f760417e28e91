"""One Phi layer: attention and MLP in parallel off one LayerNorm, with fused weights.

    p = layer_norm(x) w_in^T + b_in                    columns [q | k | v | h], in the order below
    z = [attention(q, k, v) | gelu(h)]                 [N, C + F]
    y = x + z w_out^T + b_out[0] + b_out[1]

Rows of w_in and b_in, and so columns of p: q [H, D] | k [H, D] | v [H, D] | h [F]. Inside each head of q and k the R
rotary dims come as neighbouring pairs: row 2i of a head is its dim i, row 2i+1 its dim i + R/2, the others stay. A GEMM
tile of whole pairs can so rotate its own columns, and q.k does not change when both are permuted alike.

Shapes    x, y [B, T, C]   ln_w, ln_b [C]   w_in [3C+F, C]   b_in [3C+F]   w_out [C, C+F]
          b_out [2, C]: attention, MLP
          cos, sin [S, R/2] fp32   segment_ids [B, T]   cache k, v [B, S, H, D]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cpu import linear
from .attention import attention, attention_ref
from .layer_norm import layer_norm, layer_norm_ref


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


def parallel_block(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    eps: float = 1e-5,
    segment_ids: Tensor | None = None,
    cache: tuple[Tensor, Tensor] | None = None,
    q_start: int = 0,
) -> Tensor:
    """One layer of x [B, T, C] at positions q_start.. q_start+T-1; returns [B, T, C]. Shapes as in the module's docstring.

    With `cache` = (k, v) [B, S, H, D] the rotated keys and the values are written at those positions, and attention
    reads everything up to them (chunked prefill, no gradients). Raises ValueError on shapes that do not fit.
    """
    T, C = x.shape[1:]
    p = linear(layer_norm(x, ln_w, ln_b, eps), w_in, b_in)
    q, k, v, h = split_projection(p, C, heads, cos[q_start : q_start + T], sin[q_start : q_start + T])
    if cache is not None:
        cache[0][:, q_start : q_start + T] = k
        cache[1][:, q_start : q_start + T] = v
        k, v = (c[:, : q_start + T] for c in cache)
    out = attention(q, k, v, segment_ids=segment_ids, q_start=q_start)
    z = torch.cat([out.flatten(2), F.gelu(h, approximate="tanh")], dim=-1)
    return x + linear(z, w_out, b_out[0] + b_out[1])

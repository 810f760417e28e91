"""One token per sequence against a cache of keys and values.

    decode_attention   out[b] = softmax(scale * q[b] k_cache[b, :lengths[b]]^T) v_cache[b, :lengths[b]]
    decode_block       the layer of parallel_block.py for one token per row: row b stands at positions[b], its rotated
                       key and its value are written there, and it attends to positions 0..positions[b]
    decode_head        logits = layer_norm(x) head_w^T + head_b

Shapes    q, out [B, H, D]   k_cache, v_cache [B, S, H, D]   lengths, positions [B] int64   x [B, C]   logits [B, V]
          weights as in parallel_block.py   cos, sin [S, R/2] fp32   head_w [V, C]   head_b [V]
Effects   decode_block writes k_cache and v_cache at positions; nothing else is written
Numerics  as attention.py; a row's bits depend on that row alone, not on B nor on its place in the batch; what the cache
          holds at and beyond a row's length is never read into a result, NaN included
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cpu import linear_rows
from ._host import check
from .layer_norm import layer_norm, layer_norm_ref
from .parallel_block import split_projection


def decode_attention_ref(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """The specification, row by row, in the dtype of `q`. Shapes as in the module's docstring."""
    rows = []
    for row, length in enumerate(lengths.tolist()):
        k, v = k_cache[row, :length], v_cache[row, :length]
        scores = torch.einsum("hd,shd->hs", q[row], k) * (scale or q.shape[-1] ** -0.5)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        rows.append(torch.einsum("hs,shd->hd", weights, v))
    return torch.stack(rows)


def _project(p: Tensor, C: int, heads: int, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """p [B, 3C+F] -> rotated q and k, v [B, H, D], and h [B, F]; to split_projection, rows are positions of one row."""
    return tuple(t[0] for t in split_projection(p[None], C, heads, cos[positions], sin[positions]))


def decode_block_ref(
    x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, k_cache, v_cache, positions, *, heads, eps=1e-5
) -> Tensor:
    """The specification, in the dtype of `x`. Shapes and effects as in the module's docstring."""
    rows = torch.arange(x.shape[0], device=x.device)
    p = F.linear(layer_norm_ref(x, ln_w, ln_b, eps), w_in, b_in)
    q, k, v, h = _project(p, x.shape[1], heads, cos, sin, positions)
    k_cache[rows, positions], v_cache[rows, positions] = k, v
    out = decode_attention_ref(q, k_cache, v_cache, positions + 1)
    z = torch.cat([out.flatten(1), F.gelu(h, approximate="tanh")], dim=-1)
    return x + F.linear(z, w_out) + b_out[0] + b_out[1]


def decode_head_ref(x: Tensor, ln_w: Tensor, ln_b: Tensor, head_w: Tensor, head_b: Tensor, eps: float = 1e-5) -> Tensor:
    """The specification, in the dtype of `x`. Shapes as in the module's docstring."""
    return F.linear(layer_norm_ref(x, ln_w, ln_b, eps), head_w, head_b)


def _attend_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """q [H, D] over k, v [S, H, D], in fp32: without bf16 arithmetic torch's bf16 attention is 3 times slower."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q[None, :, None].to(dtype), *(t.to(dtype).transpose(0, 1)[None] for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[0, :, 0]


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of one query per row, q [B, H, D], over the filled part of the cache; returns [B, H, D].

    Raises ValueError naming the argument whose shape or values do not fit.
    """
    B, H, D = q.shape
    check(
        k_cache.shape == v_cache.shape and k_cache.shape[::2] == (B, H) and k_cache.shape[3] == D,
        f"decode_attention: expected caches [{B}, S, {H}, {D}], got {list(k_cache.shape)} and {list(v_cache.shape)}",
    )
    filled, S = lengths.tolist(), k_cache.shape[1]
    check(
        len(filled) == B and all(1 <= length <= S for length in filled),
        f"decode_attention: expected {B} lengths in 1..{S}, got {filled}",
    )
    out = torch.empty_like(q)
    for row, length in enumerate(filled):
        out[row] = _attend_cpu(q[row], k_cache[row, :length], v_cache[row, :length], scale)
    return out


def decode_block(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """One layer for one token per row, x [B, C] at positions [B]; returns [B, C] and appends to the caches.

    No gradients. Raises ValueError naming the argument whose shape or values do not fit.
    """
    (B, C), S = x.shape, k_cache.shape[1]
    at = positions.tolist()
    check(
        len(at) == B and all(0 <= position < S for position in at),
        f"decode_block: expected {B} positions in 0..{S - 1}, got {at}",
    )
    p = linear_rows(layer_norm(x, ln_w, ln_b, eps), w_in, b_in)
    q, k, v, h = _project(p, C, heads, cos, sin, positions)
    z = torch.empty(B, w_out.shape[1], dtype=x.dtype, device=x.device)
    for row, position in enumerate(at):
        k_cache[row, position], v_cache[row, position] = k[row], v[row]
        # Row by row: torch's loops treat what is left over of a vector differently, and so its bits.
        z[row, C:] = F.gelu(h[row], approximate="tanh")
    z[:, :C] = decode_attention(q, k_cache, v_cache, positions + 1).flatten(1)
    return x + linear_rows(z, w_out, b_out[0] + b_out[1])


def decode_head(x: Tensor, ln_w: Tensor, ln_b: Tensor, head_w: Tensor, head_b: Tensor, eps: float = 1e-5) -> Tensor:
    """Logits [B, V] of x [B, C]: the final LayerNorm, then the head. No gradients. ValueError on other shapes."""
    return linear_rows(layer_norm(x, ln_w, ln_b, eps), head_w, head_b)

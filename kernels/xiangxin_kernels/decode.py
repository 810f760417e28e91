"""One token per row against a cache of keys and values.

    decode_attention   out[b] = softmax(scale * q[b] k[:lengths[b]]^T) v[:lengths[b]]   of k, v = cache[slots[b]]
    decode_block       the layer of parallel_block.py for one token per row: row b stands at positions[b], its rotated
                       key and its value are written there, and it attends to positions 0..positions[b]
    decode_head        logits = layer_norm(x) head_w^T + head_b

Shapes    q, out [B, H, D]   k_cache, v_cache [rows, S, H, D]   lengths, positions [B] int64   x [B, C]   logits [B, V]
          slots [B] int64: the cache row of each row; without it rows = B and row b's is b
          weights as in parallel_block.py   cos, sin [S, R/2] fp32   head_w [V, C]   head_b [V]
Effects   decode_block writes k_cache and v_cache at (slots, positions), all of them before any row attends: rows of
          one slot at successive positions are so many decode steps in one. Nothing else is written
Numerics  as attention.py; a row's bits depend on that row alone, not on B nor on its place in the batch; what the cache
          holds at and beyond a row's length is never read into a result, NaN included
Limits    rows must differ in slot or position
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._decode_cpu import decode_attention_cpu, decode_block_cpu, decode_head_cpu
from ._host import check
from .layer_norm import layer_norm_ref
from .parallel_block import split_projection


def decode_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """The specification, row by row, in the dtype of `q`. Shapes as in the module's docstring."""
    rows = []
    for row, length in enumerate(lengths.tolist()):
        slot = row if slots is None else slots[row]
        k, v = k_cache[slot, :length], v_cache[slot, :length]
        scores = torch.einsum("hd,shd->hs", q[row], k) * (scale or q.shape[-1] ** -0.5)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        rows.append(torch.einsum("hs,shd->hd", weights, v))
    return torch.stack(rows)


def decode_block_ref(
    x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, k_cache, v_cache, positions, *, heads, eps=1e-5, slots=None
) -> Tensor:
    """The specification, in the dtype of `x`. Shapes and effects as in the module's docstring."""
    p = F.linear(layer_norm_ref(x, ln_w, ln_b, eps), w_in, b_in)
    # To split_projection, rows are positions of one sequence.
    q, k, v, h = (t[0] for t in split_projection(p[None], x.shape[1], heads, cos[positions], sin[positions]))
    place = (torch.arange(len(x), device=x.device) if slots is None else slots, positions)
    k_cache[place], v_cache[place] = k, v
    out = decode_attention_ref(q, k_cache, v_cache, positions + 1, slots=slots)
    z = torch.cat([out.flatten(1), F.gelu(h, approximate="tanh")], dim=-1)
    return x + F.linear(z, w_out) + b_out[0] + b_out[1]


def decode_head_ref(x: Tensor, ln_w: Tensor, ln_b: Tensor, head_w: Tensor, head_b: Tensor, eps: float = 1e-5) -> Tensor:
    """The specification, in the dtype of `x`. Shapes as in the module's docstring."""
    return F.linear(layer_norm_ref(x, ln_w, ln_b, eps), head_w, head_b)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Attention of one query per row, q [B, H, D], over the filled part of the cache; returns [B, H, D].

    Raises ValueError naming the argument whose shape or values do not fit.
    """
    B, H, D = q.shape
    rows = B if slots is None else len(k_cache)
    check(
        k_cache.shape == v_cache.shape and k_cache.shape[::2] == (rows, H) and k_cache.shape[3] == D,
        f"decode_attention: expected caches [{rows}, S, {H}, {D}], got {list(k_cache.shape)} and {list(v_cache.shape)}",
    )
    return decode_attention_cpu(q, k_cache, v_cache, lengths, scale, slots)


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
    slots: Tensor | None = None,
) -> Tensor:
    """One layer for one token per row, x [B, C] at positions [B]; returns [B, C] and appends to the caches.

    No gradients. Raises ValueError naming the argument whose shape or values do not fit.
    """
    return decode_block_cpu(
        x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, k_cache, v_cache, positions, slots, heads, eps
    )


def decode_head(x: Tensor, ln_w: Tensor, ln_b: Tensor, head_w: Tensor, head_b: Tensor, eps: float = 1e-5) -> Tensor:
    """Logits [B, V] of x [B, C]: the final LayerNorm, then the head. No gradients. ValueError on other shapes."""
    return decode_head_cpu(x, ln_w, ln_b, head_w, head_b, eps)

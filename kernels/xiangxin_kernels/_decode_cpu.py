"""decode.py's ops on a CPU: torch composites whose rows have the same bits whatever else is in the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cpu import linear_rows
from ._host import check
from .layer_norm import layer_norm
from .parallel_block import split_projection


def _check_rows(op: str, what: str, values: Tensor, rows: int, low: int, high: int) -> list[int]:
    """`values` [rows] as a list, each of them in low..high; ValueError otherwise."""
    found = values.tolist()
    check(
        len(found) == rows and all(low <= value <= high for value in found),
        f"{op}: expected {rows} {what} in {low}..{high}, got {found}",
    )
    return found


def _cache_rows(op: str, slots: Tensor | None, rows: int, cache: Tensor) -> list[int]:
    """The cache row of each of `rows` rows."""
    return list(range(rows)) if slots is None else _check_rows(op, "slots", slots, rows, 0, len(cache) - 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """q [H, D] over k, v [S, H, D], in fp32: without bf16 arithmetic torch's bf16 attention is 3 times slower."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q[None, :, None].to(dtype), *(t.to(dtype).transpose(0, 1)[None] for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[0, :, 0]


def decode_attention_cpu(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None, slots: Tensor | None
) -> Tensor:
    """decode.py's decode_attention; shapes as there. ValueError on lengths or slots out of range."""
    filled = _check_rows("decode_attention", "lengths", lengths, len(q), 1, k_cache.shape[1])
    out = torch.empty_like(q)
    for row, slot in enumerate(_cache_rows("decode_attention", slots, len(q), k_cache)):
        out[row] = _attend(q[row], k_cache[slot, : filled[row]], v_cache[slot, : filled[row]], scale)
    return out


def decode_block_cpu(
    x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, k_cache, v_cache, positions, slots, heads, eps
) -> Tensor:
    """decode.py's decode_block; shapes and effects as there. ValueError on positions or slots out of range."""
    B, C = x.shape
    at = _check_rows("decode_block", "positions", positions, B, 0, k_cache.shape[1] - 1)
    cache_rows = _cache_rows("decode_block", slots, B, k_cache)
    p = linear_rows(layer_norm(x, ln_w, ln_b, eps), w_in, b_in)
    q, k, v, h = (t[0] for t in split_projection(p[None], C, heads, cos[positions], sin[positions]))
    z = torch.empty(B, w_out.shape[1], dtype=x.dtype, device=x.device)
    for row, place in enumerate(zip(cache_rows, at, strict=True)):
        k_cache[place], v_cache[place] = k[row], v[row]
        # Row by row: torch's loops treat what is left over of a vector differently, and so its bits.
        z[row, C:] = F.gelu(h[row], approximate="tanh")
    z[:, :C] = decode_attention_cpu(q, k_cache, v_cache, positions + 1, None, slots).flatten(1)
    return x + linear_rows(z, w_out, b_out[0] + b_out[1])


def decode_head_cpu(x: Tensor, ln_w: Tensor, ln_b: Tensor, head_w: Tensor, head_b: Tensor, eps: float) -> Tensor:
    """decode.py's decode_head; shapes as there."""
    return linear_rows(layer_norm(x, ln_w, ln_b, eps), head_w, head_b)

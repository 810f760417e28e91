"""One token per sequence against a cache of keys and values.

    out[b] = softmax(scale * q[b] k_cache[b, :lengths[b]]^T) v_cache[b, :lengths[b]]

Shapes    q, out [B, H, D]   k_cache, v_cache [B, S, H, D]   lengths [B] int64: how many positions of each row are filled
Numerics  as attention.py; positions at and beyond lengths[b] are never read into a result, whatever they hold
"""

import torch
from torch import Tensor


def decode_attention_ref(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """The specification, row by row, in the dtype of `q`. Shapes as in the module's docstring."""
    rows = []
    for row, length in enumerate(lengths.tolist()):
        k, v = k_cache[row, :length], v_cache[row, :length]
        scores = torch.einsum("hd,shd->hs", q[row], k) * (scale or q.shape[-1] ** -0.5)
        rows.append(
            torch.einsum(
                "hs,shd->hd", scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype), v
            )
        )
    return torch.stack(rows)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of one query per row, q [B, H, D], over the filled part of the cache; returns [B, H, D]."""
    return decode_attention_ref(q, k_cache, v_cache, lengths, scale)

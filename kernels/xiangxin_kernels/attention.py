"""Causal attention with partial rotary embedding.

    out[t] = softmax(scale * q[t] k[:q_start + t + 1]^T) v        scale defaults to D ** -0.5

With cos, sin the first R = 2 * cos.shape[1] dims of q and k are rotated first (rotate-half: dim i pairs with i + R/2);
query t stands at position q_start + t, key s at position s. With segment_ids, keys of other segments are invisible.

Shapes    q, out [B, T, H, D]   k, v [B, S, H, D], S >= q_start + T   cos, sin [S, R/2] fp32   segment_ids [B, S]
Numerics  scores, softmax and accumulation in fp32; rotation in fp32, rounded to the dtype of q once
Source    Dao 2023, arXiv:2307.08691 (flash attention); Su et al. 2021, arXiv:2104.09864 (rotary embedding)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._host import check


def rotate_half_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first R dims of x [B, T, H, D] by cos, sin [T, R/2]: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([(x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest], dim=-1)


def visible_keys(T: int, S: int, q_start: int, segment_ids: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query may see: bool [T, S], or [B, 1, T, S] with segment_ids [B, S]."""
    positions = torch.arange(q_start, q_start + T, device=device)
    mask = positions[:, None] >= torch.arange(S, device=device)
    if segment_ids is not None:
        queries = segment_ids[:, q_start : q_start + T]
        mask = mask & (queries[:, None, :, None] == segment_ids[:, None, None, :])
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
    T, S = q.shape[1], k.shape[1]
    if cos is not None:
        q = rotate_half_ref(q, cos[q_start : q_start + T], sin[q_start : q_start + T])
        k = rotate_half_ref(k, cos[:S], sin[:S])
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~visible_keys(T, S, q_start, segment_ids, q.device), float("-inf"))
    return torch.einsum(
        "bhts,bshd->bthd", scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype), v
    )


def _attention_cpu(q, k, v, cos, sin, scale, segment_ids, q_start) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    if cos is not None:
        q = rotate_half_ref(q, cos[q_start : q_start + T], sin[q_start : q_start + T])
        k = rotate_half_ref(k, cos[:S], sin[:S])
    k, v = k[:, : q_start + T], v[:, : q_start + T]
    plain = q_start == 0 and segment_ids is None
    mask = None if plain else visible_keys(T, k.shape[1], q_start, segment_ids, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=plain, scale=scale
    )
    return out.transpose(1, 2)


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
    """Causal attention of q [B, T, H, D] over k, v [B, S, H, D]; returns [B, T, H, D]. The module's docstring has the rest.

    Raises ValueError naming the argument whose shape does not fit.
    """
    B, T, H, D = q.shape
    check(
        k.shape == v.shape and k.shape[::2] == (B, H) and k.shape[3] == D,
        f"attention: expected k, v [{B}, S, {H}, {D}], got {list(k.shape)} and {list(v.shape)}",
    )
    check(k.shape[1] >= q_start + T, f"attention: expected at least {q_start + T} keys, got {k.shape[1]}")
    return _attention_cpu(q, k, v, cos, sin, scale, segment_ids, q_start)

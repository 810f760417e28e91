"""decode.py's ops on a CPU: torch composites whose rows have the same bits whatever else is in the batch."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cpu import kept, linear_rows, next_power_of_2, weighted_sums
from .layer_norm import layer_norm


def _cache_rows(slots: Tensor | None, rows: int) -> Sequence[int]:
    """The cache row of each of `rows` rows."""
    return range(rows) if slots is None else slots.tolist()


@functools.lru_cache(4)
def _heads_first(positions: int, heads: int) -> Tensor:
    """int32 [heads, positions]: which row of [positions * heads] each position of a head is."""
    with torch.inference_mode(False):
        return torch.arange(positions * heads, dtype=torch.int32).view(positions, heads).T.contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """q [H, D] over k, v [S, H, D]: [H, D].

    Scores in fp32 of widened keys; the weighted values as bags, read as they lie. Without bf16 arithmetic, 1024
    positions of 32 heads take 2.2 ms on two AVX2 cores, torch's attention 3.8 with widened copies and 5.5 in bf16. All
    that grows with S is in memory that is kept, but for bf16 weights that torch widens inside.
    """
    (S, H, D), dtype = k.shape, torch.promote_types(q.dtype, torch.float32)
    if k.dtype != dtype:
        k = kept("wide", k.shape).copy_(k)
    scores, weights = kept("scores", (H, 1, S), dtype), kept("weights", (H, 1, S), dtype)
    torch.bmm(q.to(dtype)[:, None], k.permute(1, 2, 0), out=scores)
    torch.softmax(scores.mul_(scale or D**-0.5), -1, out=weights)
    if v.dtype != dtype:
        weights = kept("rounded", weights.shape, v.dtype).copy_(weights)
    # Of v [S*H, D], head by head.
    rows = kept("rows", (H, S), torch.int32).copy_(_heads_first(next_power_of_2(S), H)[:, :S])
    begins = torch.arange(0, S * H, S, dtype=torch.int32)
    return weighted_sums(v.reshape(S * H, D), rows.view(-1), begins, weights.view(-1))


def decode_attention_cpu(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None, slots: Tensor | None
) -> Tensor:
    """decode.py's decode_attention; shapes as there, and checked there."""
    out = torch.empty_like(q)
    for row, (slot, length) in enumerate(zip(_cache_rows(slots, len(q)), lengths.tolist(), strict=True)):
        out[row] = _attend(q[row], k_cache[slot, :length], v_cache[slot, :length], scale)
    return out


def _rotate(t: Tensor, turn: Tensor) -> None:
    """Rotates the leading neighbouring pairs of t [H, D], in place, by the complex numbers `turn` [R/2]."""
    rotary = t[:, : 2 * len(turn)]
    pairs = torch.view_as_complex(rotary.to(turn.real.dtype, copy=True).contiguous().unflatten(1, (-1, 2)))
    rotary.copy_(torch.view_as_real(pairs.mul_(turn)).flatten(1))


def decode_block_cpu(
    x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, k_cache, v_cache, positions, slots, heads, eps
) -> Tensor:
    """decode.py's decode_block; shapes and effects as there, and checked there.

    Row by row: torch's loops treat what is left over of a vector differently, and so its bits.
    """
    B, C = x.shape
    places = list(zip(_cache_rows(slots, B), positions.tolist(), strict=True))
    p = linear_rows(layer_norm(x, ln_w, ln_b, eps), w_in, b_in)
    z = torch.empty(B, C + p.shape[1] - 3 * C, dtype=x.dtype, device=x.device)
    for row, place in enumerate(places):
        q_and_k = p[row, : 2 * C].view(2 * heads, -1)
        _rotate(q_and_k, torch.complex(cos[place[1]], sin[place[1]]))
        k_cache[place], v_cache[place] = q_and_k[heads:], p[row, 2 * C : 3 * C].view(heads, -1)
        z[row, C:] = F.gelu(p[row, 3 * C :], approximate="tanh")
    for row, (slot, position) in enumerate(places):
        q, seen = p[row, :C].view(heads, -1), slice(position + 1)
        z[row, :C] = _attend(q, k_cache[slot, seen], v_cache[slot, seen], None).flatten()
    return linear_rows(z, w_out, b_out[0] + b_out[1]).add_(x)


def decode_head_cpu(x: Tensor, ln_w: Tensor, ln_b: Tensor, head_w: Tensor, head_b: Tensor, eps: float) -> Tensor:
    """decode.py's decode_head; shapes as there."""
    return linear_rows(layer_norm(x, ln_w, ln_b, eps), head_w, head_b).to(torch.promote_types(x.dtype, torch.float32))

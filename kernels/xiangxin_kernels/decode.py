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
Numerics  logits in fp32; else as attention.py; a row's bits depend on that row alone, not on B nor on its place in the
          batch; what the cache holds at and beyond a row's length is never read into a result, NaN included
Limits    rows that share slot and position must be equal
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._decode_attention import _decode_attention_kernel
from ._decode_cpu import decode_attention_cpu, decode_block_cpu, decode_head_cpu
from ._decode_gemv import (
    _decode_head_kernel,
    _decode_norm_kernel,
    _decode_project_in_kernel,
    _decode_project_out_kernel,
)
from ._host import INTERPRET, as_rows, check, check_dtypes, kernel_op, use_triton
from ._tuning import DECODE_WARPS, arch_of, choose_decode, choose_decode_attention
from .layer_norm import layer_norm_ref
from .parallel_block import split_projection
from .quantized import GROUPS, QuantizedWeight, dequantize, int4_run

MAX_ROWS = 32  # of one product's launch

Weight = Tensor | QuantizedWeight


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else dequantize(weight, dtype)


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
    p = F.linear(layer_norm_ref(x, ln_w, ln_b, eps), _dense(w_in, x.dtype), b_in)
    # To split_projection, rows are positions of one sequence.
    q, k, v, h = (t[0] for t in split_projection(p[None], x.shape[1], heads, cos[positions], sin[positions]))
    place = (torch.arange(len(x), device=x.device) if slots is None else slots, positions)
    k_cache[place], v_cache[place] = k, v
    out = decode_attention_ref(q, k_cache, v_cache, positions + 1, slots=slots)
    z = torch.cat([out.flatten(1), F.gelu(h, approximate="tanh")], dim=-1)
    return x + F.linear(z, _dense(w_out, x.dtype)) + b_out[0] + b_out[1]


def decode_head_ref(x: Tensor, ln_w: Tensor, ln_b: Tensor, head_w: Weight, head_b: Tensor, eps: float = 1e-5) -> Tensor:
    """The specification, in the dtype of `x`; logits in fp32. Shapes as in the module's docstring."""
    logits = F.linear(layer_norm_ref(x, ln_w, ln_b, eps), _dense(head_w, x.dtype), head_b)
    return logits.to(torch.promote_types(x.dtype, torch.float32))


def _parts(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """What the kernels read of a weight: its numbers, or its codes and their scale."""
    return (weight, None) if isinstance(weight, Tensor) else weight


def _bits(w: Tensor) -> int:
    return 4 if w.dtype == torch.uint8 else 8 * w.dtype.itemsize


def _layout(w: Tensor, scale: Tensor | None, K: int) -> dict[str, int]:
    """How a weight [N, K] lies in memory, and how a step of K is cut: a row's bits depend on it.

    A slice of a step is 64 bytes of each row of the weight, 16 for each of four lanes; fewer in short runs of int4.
    """
    bits = _bits(w)
    block_k = int4_run(K) if bits == 4 else 512 // bits
    group = K // scale.shape[1] if bits == 4 else 0
    return {"BITS": bits, "GROUP": group, "SLICES": DECODE_WARPS, "BLOCK_K": block_k, "DEPTH": 2, "PIN": not INTERPRET}


def _words(w: Tensor) -> Tensor:
    """What the kernels load: codes in words of 32 bits, other weights as they are."""
    return w if w.is_floating_point() else w.view(torch.int32)


def _split_k(K: int, N: int, w: Tensor, scale: Tensor | None) -> int:
    """Columns of a split of w_out [N, K]: as many as w_in has, in whole steps."""
    layout = _layout(w, scale, K)
    step = layout["SLICES"] * layout["BLOCK_K"]
    return math.ceil(N / step) * step


def _launch_options(num_warps: int, pdl: bool) -> dict[str, int | bool]:
    """Without contraction a product's rounding cannot depend on what else the compiler sees beside it."""
    return {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False} | ({"launch_pdl": True} if pdl else {})


@kernel_op(mutates=("y",))
def _decode_norm(x: Tensor, ln_w: Tensor, ln_b: Tensor, y: Tensor, eps: float) -> None:
    """x, y [B, C]."""
    (B, C), arch = x.shape, arch_of(x.device)
    _decode_norm_kernel[(B,)](
        x, ln_w, ln_b, y, x.stride(0), eps, C=C, PDL=arch >= 90, **_launch_options(DECODE_WARPS, arch >= 90)
    )


@kernel_op(mutates=("q", "k_cache", "v_cache", "z", "counters"))
def _decode_project_in(
    x: Tensor, ln_w: Tensor, ln_b: Tensor, w_in: Tensor, scale: Tensor | None, b_in: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor, slots: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor, z: Tensor, counters: Tensor,
    heads: int, eps: float,
) -> None:  # fmt: skip
    """x, q [B, C]; k and v into the caches, gelu(h) into z[:, C:]; counters int32, set to zero.

    `x` is normalised here with the config's `norm`, by _decode_norm before without.
    """
    B, C = x.shape
    N, arch = w_in.shape[0], arch_of(x.device)
    config = choose_decode(B, _bits(w_in), arch)
    programs = math.ceil(N / config.block_n)
    _decode_project_in_kernel[(programs,)](
        x, ln_w, ln_b, _words(w_in), scale, b_in, cos, sin, positions, slots, q, k_cache, v_cache, z, counters,
        x.stride(0), k_cache.stride(0), k_cache.stride(1), z.stride(0), B, N, counters.numel(), eps,
        C=C, D=C // heads, R=2 * cos.shape[1], **_layout(w_in, scale, C), NORM=config.norm, BLOCK_N=config.block_n,
        ROWS=config.rows, ZEROS=1 << (math.ceil(counters.numel() / programs) - 1).bit_length(), PDL=arch >= 90,
        **_launch_options(DECODE_WARPS, arch >= 90),
    )  # fmt: skip


@kernel_op(mutates=("out", "partial", "counters"))
def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, slots: Tensor | None, out: Tensor, partial: Tensor,
    counters: Tensor, scale: float, longer: int,
) -> None:  # fmt: skip
    """q, out [B, H, D] over the first lengths + longer positions; partial [B, H, splits, D + 2] fp32; counters zero."""
    (B, H, D), arch = q.shape, arch_of(q.device)
    config = choose_decode_attention(arch)
    main = 1 << (D.bit_length() - 1)
    tail = 0 if main == D else 1 << (D - main - 1).bit_length()
    _decode_attention_kernel[(H, partial.shape[2], B)](
        q, k_cache, v_cache, lengths, slots, out, partial, counters,
        q.stride(0), k_cache.stride(0), k_cache.stride(1), out.stride(0), scale * math.log2(math.e), H,
        partial.shape[2], LONGER=longer, D=D, D_MAIN=main, D_TAIL=tail, SPLIT=config.split, PDL=arch >= 90,
        **_launch_options(config.num_warps, arch >= 90),
    )  # fmt: skip


@kernel_op(mutates=("out", "partial", "counters"))
def _decode_project_out(
    z: Tensor, w_out: Tensor, scale: Tensor | None, b_out: Tensor, x: Tensor, out: Tensor, partial: Tensor,
    counters: Tensor,
) -> None:  # fmt: skip
    """out [B, C] = x + z w_out^T + both biases; partial [splits, B, C] fp32; counters zero, one for each tile of C."""
    (B, K), N, arch = z.shape, x.shape[1], arch_of(x.device)
    config = choose_decode(B, _bits(w_out), arch)
    _decode_project_out_kernel[(math.ceil(N / config.block_n), partial.shape[0])](
        z, _words(w_out), scale, b_out, x, out, partial, counters, z.stride(0), x.stride(0), B, N,
        K=K, SPLIT_K=_split_k(K, N, w_out, scale), **_layout(w_out, scale, K), BLOCK_N=config.block_n,
        ROWS=config.rows, PDL=arch >= 90, **_launch_options(DECODE_WARPS, arch >= 90),
    )  # fmt: skip


@kernel_op(mutates=("logits",))
def _decode_head(
    x: Tensor, ln_w: Tensor, ln_b: Tensor, head_w: Tensor, scale: Tensor | None, head_b: Tensor, logits: Tensor,
    eps: float,
) -> None:  # fmt: skip
    """x [B, C], as _decode_project_in takes it; logits [B, V] fp32."""
    (B, C), N, arch = x.shape, logits.shape[1], arch_of(x.device)
    config = choose_decode(B, _bits(head_w), arch)
    _decode_head_kernel[(math.ceil(N / config.block_n),)](
        x, ln_w, ln_b, _words(head_w), scale, head_b, logits, x.stride(0), B, N, eps,
        C=C, **_layout(head_w, scale, C), NORM=config.norm, BLOCK_N=config.block_n, ROWS=config.rows, PDL=arch >= 90,
        **_launch_options(DECODE_WARPS, arch >= 90),
    )  # fmt: skip


def _offset(t: Tensor) -> int:
    """Where `t` begins in its storage; torch.compile, which cannot ask, aligns what it is given."""
    return 0 if torch.compiler.is_compiling() else t.storage_offset()


def _check_weight(op: str, name: str, weight: Weight, rows: int, columns: int) -> None:
    found = list(weight.shape)
    check(found == [rows, columns], f"{op}: expected {name} [{rows}, {columns}], got {found}")
    w, scale = _parts(weight)
    check(w.is_contiguous(), f"{op}: expected {name} contiguous, got strides {w.stride()}")
    if scale is None:
        return
    check(scale.is_contiguous(), f"{op}: expected the scale of {name} contiguous, got strides {scale.stride()}")
    whole = columns % (4 if weight.bits == 8 else 32) == 0 and _offset(w) % 4 == 0
    check(whole, f"{op}: expected {name} in whole words, got {columns} columns of codes from byte {_offset(w)} on")
    known = weight.bits == 8 or weight.group in GROUPS
    check(known, f"{op}: expected {name} in groups of 32, 64 or 128, got {weight.group}")
    shape = [rows] if weight.bits == 8 else [rows, columns // weight.group]
    check([*scale.shape] == shape, f"{op}: expected the scale of {name} {shape}, got {[*scale.shape]}")


def _check_shape(op: str, name: str, tensor: Tensor, *shape: int) -> None:
    check(tensor.shape == shape, f"{op}: expected {name} {list(shape)}, got {list(tensor.shape)}")


def _check_range(op: str, name: str, values: Tensor, low: int, high: int) -> None:
    """Only where the values are at hand: to look at those of a GPU would stop it, and the graph being captured."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        found = values.tolist()
        inside = all(low <= value <= high for value in found)
        check(inside, f"{op}: expected {len(found)} {name} in {low}..{high}, got {found}")


def _check_rows(op: str, q_shape: tuple, k_cache, v_cache, name: str, at: Tensor, low: int, slots) -> None:
    """The cache, `at` (lengths or positions, from `low` on) and slots for queries of shape [B, H, D]."""
    B, H, D = q_shape
    rows, S = B if slots is None else len(k_cache), k_cache.shape[1]
    check(
        k_cache.shape == v_cache.shape == (rows, S, H, D),
        f"{op}: expected caches [{rows}, S, {H}, {D}], got {list(k_cache.shape)} and {list(v_cache.shape)}",
    )
    _check_range(op, name, at, low, S - 1 + low)
    check(at.shape == (B,), f"{op}: expected {B} {name} in {low}..{S - 1 + low}, got {list(at.shape)}")
    if slots is not None:
        check(slots.shape == (B,), f"{op}: expected slots [{B}], got {list(slots.shape)}")
        _check_range(op, "slots", slots, 0, rows - 1)


def _check_kernel_caches(op: str, k_cache: Tensor, v_cache: Tensor) -> None:
    D = k_cache.shape[3]
    fits = k_cache.stride() == v_cache.stride() and k_cache.stride()[2:] == (D, 1)
    check(fits, f"{op}: expected k_cache and v_cache with equal strides and whole [H, D], got {k_cache.stride()}")


def _aligned_rows(x: Tensor) -> Tensor:
    """x [B, C] with each row at a multiple of 16 numbers.

    Of other rows the compiler would load, and add up, single numbers, but of one alone still eight at a time.
    """
    x = as_rows(x)
    if x.stride(0) % 16 == 0 and _offset(x) % 16 == 0:
        return x
    return x.new_empty(len(x), math.ceil(x.shape[1] / 16) * 16)[:, : x.shape[1]].copy_(x)


def _normalized(x: Tensor, ln_w: Tensor, ln_b: Tensor, eps: float, w: Tensor) -> Tensor:
    """What the product with `w` reads of x: itself where that normalises its rows itself."""
    if choose_decode(len(x), _bits(w), arch_of(x.device)).norm:
        return x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _decode_norm(x, ln_w, ln_b, y, eps)
    return y


def _scratch(q: Tensor, S: int) -> Tensor:
    """For the results of every split of S positions, q [B, H, D]."""
    (B, H, D), split = q.shape, choose_decode_attention(arch_of(q.device)).split
    return torch.empty(B, H, math.ceil(S / split), D + 2, dtype=torch.float32, device=q.device)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Attention of one query per row, q [B, H, D], over the filled part of the cache; returns [B, H, D].

    Raises ValueError naming the argument whose shape or values do not fit; values on a GPU are not looked at.
    """
    _check_rows("decode_attention", q.shape, k_cache, v_cache, "lengths", lengths, 1, slots)
    if not use_triton(q):
        return decode_attention_cpu(q, k_cache, v_cache, lengths, scale, slots)
    check_dtypes("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache)
    _check_kernel_caches("decode_attention", k_cache, v_cache)
    q = q.contiguous()
    B, H, D = q.shape
    out, counters = torch.empty_like(q), torch.zeros(B * H, dtype=torch.int32, device=q.device)
    scratch = _scratch(q, k_cache.shape[1])
    _decode_attention(q, k_cache, v_cache, lengths, slots, out, scratch, counters, scale or D**-0.5, 0)
    return out


def _decode_block_kernels(
    x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, k_cache, v_cache, positions, slots, heads, eps
) -> Tensor:
    (B, C), K, device = x.shape, w_out.shape[1], x.device
    groups = [slice(start, min(start + MAX_ROWS, B)) for start in range(0, B, MAX_ROWS)]
    if slots is None and len(groups) > 1:
        slots = torch.arange(B, device=device)
    tiles = math.ceil(
        C / min(choose_decode(rows.stop - rows.start, _bits(w_out[0]), arch_of(device)).block_n for rows in groups)
    )
    counters = torch.empty(B * heads + len(groups) * tiles, dtype=torch.int32, device=device)
    q, z, out = x.new_empty(B, C), x.new_empty(B, K), x.new_empty(B, C)
    w_in, w_out = _parts(w_in), _parts(w_out)
    for rows in groups:
        y, place = _normalized(x[rows], ln_w, ln_b, eps, w_in[0]), None if slots is None else slots[rows]
        _decode_project_in(
            y, ln_w, ln_b, *w_in, b_in, cos, sin, positions[rows], place, q[rows], k_cache, v_cache, z[rows], counters,
            heads, eps,
        )  # fmt: skip
    q, attended = (t.unflatten(1, (heads, C // heads)) for t in (q, z[:, :C]))
    scratch = _scratch(q, k_cache.shape[1])
    scale = (C // heads) ** -0.5
    _decode_attention(q, k_cache, v_cache, positions, slots, attended, scratch, counters[: B * heads], scale, 1)
    splits = math.ceil(K / _split_k(K, C, *w_out))
    for i, rows in enumerate(groups):
        partial = torch.empty(splits, rows.stop - rows.start, C, dtype=torch.float32, device=device)
        mine = counters[B * heads + i * tiles :][:tiles]
        _decode_project_out(z[rows], *w_out, b_out, x[rows], out[rows], partial, mine)
    return out


def decode_block(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor,
    w_in: Weight,
    b_in: Tensor,
    w_out: Weight,
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

    No gradients. Raises ValueError naming the argument whose shape or values do not fit; values on a GPU are not
    looked at.
    """
    (B, C), op = x.shape, "decode_block"
    check(C % heads == 0, f"{op}: expected heads that divide C = {C}, got {heads}")
    _check_rows(op, (B, heads, C // heads), k_cache, v_cache, "positions", positions, 0, slots)
    weights = (ln_w, ln_b, w_in, b_in, w_out, b_out)
    if not use_triton(x):
        return decode_block_cpu(x, *weights, cos, sin, k_cache, v_cache, positions, slots, heads, eps)
    N, K = w_in.shape[0], w_out.shape[1]
    check(
        N == 2 * C + K, f"{op}: expected w_in [3C+F, {C}] and w_out [{C}, C+F], got {[*w_in.shape]}, {[*w_out.shape]}"
    )
    fits = cos.dim() == 2 and 2 * cos.shape[1] <= C // heads and cos.dtype == sin.dtype == torch.float32
    check(
        fits, f"{op}: expected cos [S, R/2] with R at most {C // heads} in float32, got {list(cos.shape)}, {cos.dtype}"
    )
    for name, tensor, shape in (
        ("ln_w", ln_w, (C,)), ("ln_b", ln_b, (C,)), ("b_in", b_in, (N,)), ("b_out", b_out, (2, C)),
        ("sin", sin, cos.shape),
    ):  # fmt: skip
        _check_shape(op, name, tensor, *shape)
    _check_weight(op, "w_in", w_in, N, C)
    _check_weight(op, "w_out", w_out, C, K)
    dense = {name: w for name, w in (("w_in", w_in), ("w_out", w_out)) if isinstance(w, Tensor)}
    check_dtypes(op, x=x, ln_w=ln_w, ln_b=ln_b, b_in=b_in, b_out=b_out, k_cache=k_cache, v_cache=v_cache, **dense)
    _check_kernel_caches(op, k_cache, v_cache)
    cos, sin = cos.contiguous(), sin.contiguous()
    return _decode_block_kernels(_aligned_rows(x), *weights, cos, sin, k_cache, v_cache, positions, slots, heads, eps)


def decode_head(x: Tensor, ln_w: Tensor, ln_b: Tensor, head_w: Weight, head_b: Tensor, eps: float = 1e-5) -> Tensor:
    """Logits [B, V] in fp32 of x [B, C]: the final LayerNorm, then the head. No gradients.

    Raises ValueError naming the argument that does not fit.
    """
    if not use_triton(x):
        return decode_head_cpu(x, ln_w, ln_b, head_w, head_b, eps)
    (B, C), V, op = x.shape, head_w.shape[0], "decode_head"
    for name, tensor, shape in (("ln_w", ln_w, (C,)), ("ln_b", ln_b, (C,)), ("head_b", head_b, (V,))):
        _check_shape(op, name, tensor, *shape)
    _check_weight(op, "head_w", head_w, V, C)
    dense = {"head_w": head_w} if isinstance(head_w, Tensor) else {}
    check_dtypes(op, x=x, ln_w=ln_w, ln_b=ln_b, head_b=head_b, **dense)
    parts = _parts(head_w)
    x, logits = _aligned_rows(x), torch.empty(B, V, dtype=torch.float32, device=x.device)
    for start in range(0, B, MAX_ROWS):
        rows = slice(start, start + MAX_ROWS)
        y = _normalized(x[rows], ln_w, ln_b, eps, parts[0])
        _decode_head(y, ln_w, ln_b, *parts, head_b, logits[rows], eps)
    return logits

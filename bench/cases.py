"""The registry: for every op its inputs at Phi's shapes, and what it must compute and move.

FLOPs and bytes are those of the mathematics (each input read once, each output written once, the causal half of the
scores), not those a provider happens to spend: a provider that does more is slower by that much.
"""

from collections.abc import Callable

import torch
import xiangxin_kernels as kernels
from torch import Tensor

from xiangxin_fast.config import PhiConfig

from .case import Case, Draw, Inputs, Shape, layer_weights, rotary_tables
from .gemm_cases import GEMM_CASES

_PHI_2 = PhiConfig.from_preset("phi-2")
TINY = PhiConfig(vocab=96, channels=80, layers=1, heads=1, rotary_dim=32, mlp_hidden=96, context=32)
SHAPES = {
    "phi": Shape(_PHI_2, 8, 2048),
    "cpu": Shape(_PHI_2, 1, 256),
    "tiny": Shape(TINY, 2, 9, tiny=True),
}


def _attention_inputs(shape: Shape, draw: Draw) -> Inputs:
    H, D = shape.config.heads, shape.config.head_dim
    q, k, v = (draw(shape.B, shape.T, H, D) for _ in range(3))
    cos, sin = rotary_tables(shape, draw)
    return {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}


def attention_flops(shape: Shape) -> float:
    """Causal half of q k^T and of p v."""
    return 2.0 * shape.B * shape.config.channels * shape.T**2


def _decode_inputs(shape: Shape, draw: Draw) -> Inputs:
    H, D, S = shape.config.heads, shape.config.head_dim, shape.T
    k_cache, v_cache = (draw(shape.B, S, H, D) for _ in range(2))
    lengths = torch.full((shape.B,), S, device=draw.device)
    return {"q": draw(shape.B, H, D), "k_cache": k_cache, "v_cache": v_cache, "lengths": lengths}


def _decode_block_inputs(shape: Shape, draw: Draw) -> Inputs:
    inputs = _block_inputs(shape, draw)
    H, D, S = shape.config.heads, shape.config.head_dim, shape.T
    k_cache, v_cache = (draw(shape.B, S, H, D) for _ in range(2))
    last = torch.full((shape.B,), S - 1, device=draw.device)
    inputs["x"] = inputs["x"][:, 0].contiguous()
    return inputs | {"k_cache": k_cache, "v_cache": v_cache, "positions": last}


def _decode_head_inputs(shape: Shape, draw: Draw) -> Inputs:
    C, V, std = shape.config.channels, shape.config.vocab, shape.config.init_std
    return {
        "x": draw(shape.B, C),
        "ln_w": 1 + draw(C, std=0.1),
        "ln_b": draw(C, std=0.1),
        "head_w": draw(V, C, std=std),
        "head_b": draw(V, std=std),
    }


def _layer_norm_inputs(shape: Shape, draw: Draw) -> Inputs:
    C = shape.config.channels
    return {"x": draw(shape.N, C), "weight": 1 + draw(C, std=0.1), "bias": draw(C, std=0.1)}


def _mlp_inputs(shape: Shape, draw: Draw) -> Inputs:
    C, F, std = shape.config.channels, shape.config.mlp_hidden, shape.config.init_std
    return {
        "x": draw(shape.N, C),
        "w1": draw(F, C, std=std),
        "b1": draw(F, std=std),
        "w2": draw(C, F, std=std),
        "b2": draw(C, std=std),
    }


def _block_inputs(shape: Shape, draw: Draw) -> Inputs:
    C, F, std = shape.config.channels, shape.config.mlp_hidden, shape.config.init_std
    cos, sin = rotary_tables(shape, draw)
    return {
        "x": draw(shape.B, shape.T, C),
        "ln_w": 1 + draw(C, std=0.1),
        "ln_b": draw(C, std=0.1),
        "w_in": draw(3 * C + F, C, std=std),
        "b_in": draw(3 * C + F, std=std),
        "w_out": draw(C, C + F, std=std),
        "b_out": draw(2, C, std=std),
        "cos": cos,
        "sin": sin,
        "heads": shape.config.heads,
    }


def _logits_inputs(shape: Shape, draw: Draw) -> Inputs:
    # A trained model is sure of many tokens: losses from 0 up, which flat random logits would never reach.
    logits = draw(shape.N, shape.config.vocab, std=2.0)
    targets = draw.ids(shape.N, below=shape.config.vocab)
    logits[torch.arange(0, shape.N, 2, device=logits.device), targets[::2]] += 16.0
    return {"logits": logits, "targets": _ignore_some(targets)}


def _head_inputs(shape: Shape, draw: Draw) -> Inputs:
    C, V = shape.config.channels, shape.config.vocab
    targets = _ignore_some(draw.ids(shape.N, below=V))
    weight, bias = draw(V, C, std=2 * shape.config.init_std), draw(V, std=shape.config.init_std)
    return {"x": draw(shape.N, C), "weight": weight, "bias": bias, "targets": targets}


def _ignore_some(targets: Tensor) -> Tensor:
    targets[::37] = -100
    return targets


def _fwd_bwd(fwd: float, bwd: float) -> dict[str, float]:
    return {"fwd": fwd, "bwd": bwd, "fwdbwd": fwd + bwd}


def _norm_traffic(shape: Shape, e: int) -> dict[str, float]:
    elements = e * shape.N * shape.config.channels
    return _fwd_bwd(2.0 * elements, 3.0 * elements)


def _attention_traffic(shape: Shape, e: int) -> dict[str, float]:
    elements = e * shape.N * shape.config.channels
    return _fwd_bwd(4.0 * elements, 8.0 * elements)


def _mlp_traffic(shape: Shape, e: int) -> dict[str, float]:
    C, F = shape.config.channels, shape.config.mlp_hidden
    rows, weights, hidden = shape.N * C, 2 * C * F, shape.N * F  # the hidden layer is saved once and read once
    return _fwd_bwd(e * (2.0 * rows + weights + hidden), e * (3.0 * rows + 2 * weights + hidden))


def _block_traffic(shape: Shape, e: int) -> dict[str, float]:
    C, F = shape.config.channels, shape.config.mlp_hidden
    rows, weights, saved = shape.N * C, layer_weights(shape.config), shape.N * (4 * C + F)
    return _fwd_bwd(e * (2.0 * rows + weights + saved), e * (3.0 * rows + 2 * weights + saved))


def _logits_traffic(shape: Shape, e: int) -> dict[str, float]:
    logits = e * shape.N * shape.config.vocab
    return _fwd_bwd(1.0 * logits, 2.0 * logits)


def _head_traffic(shape: Shape, e: int) -> dict[str, float]:
    rows, weights = shape.N * shape.config.channels, shape.config.vocab * shape.config.channels
    return _fwd_bwd(e * (1.0 * rows + weights), e * (2.0 * rows + 2 * weights))


def _decode_traffic(shape: Shape, e: int) -> dict[str, float]:
    return {"fwd": 2.0 * e * shape.B * (shape.T + 1) * shape.config.channels}


def _decode_block_traffic(shape: Shape, e: int) -> dict[str, float]:
    return {"fwd": float(e * layer_weights(shape.config)) + _decode_traffic(shape, e)["fwd"]}


def _gemm_flops(shape: Shape, weights: int) -> dict[str, float]:
    return _fwd_bwd(2.0 * shape.N * weights, 4.0 * shape.N * weights)


def _block_flops(shape: Shape) -> dict[str, float]:
    matrices, scores = _gemm_flops(shape, layer_weights(shape.config)), attention_flops(shape)
    return _fwd_bwd(matrices["fwd"] + scores, matrices["bwd"] + 2.5 * scores)


def _per_element(count: Callable[[Shape], int], fwd: float, bwd: float) -> Callable[[Shape], dict[str, float]]:
    return lambda shape: _fwd_bwd(fwd * count(shape), bwd * count(shape))


CASES = {
    case.op: case
    for case in (
        Case(
            op="layer_norm",
            reference=kernels.layer_norm_ref,
            ours=kernels.layer_norm,
            make=_layer_norm_inputs,
            leaves=("x", "weight", "bias"),
            flops=_per_element(lambda s: s.N * s.config.channels, 8, 14),
            moved=_norm_traffic,
        ),
        Case(
            op="attention",
            reference=kernels.attention_ref,
            ours=kernels.attention,
            make=_attention_inputs,
            leaves=("q", "k", "v"),
            rows=("q", "k", "v"),
            flops=lambda s: _fwd_bwd(attention_flops(s), 2.5 * attention_flops(s)),
            moved=_attention_traffic,
        ),
        Case(
            op="gelu_mlp",
            reference=kernels.gelu_mlp_ref,
            ours=kernels.gelu_mlp,
            make=_mlp_inputs,
            leaves=("x", "w1", "b1", "w2", "b2"),
            flops=lambda s: _gemm_flops(s, 2 * s.config.channels * s.config.mlp_hidden),
            moved=_mlp_traffic,
        ),
        Case(
            op="parallel_block",
            reference=kernels.parallel_block_ref,
            ours=kernels.parallel_block,
            make=_block_inputs,
            leaves=("x", "ln_w", "ln_b", "w_in", "b_in", "w_out", "b_out"),
            rows=("x",),
            flops=_block_flops,
            moved=_block_traffic,
        ),
        Case(
            op="cross_entropy",
            reference=kernels.cross_entropy_ref,
            ours=kernels.cross_entropy,
            make=_logits_inputs,
            leaves=("logits",),
            flops=_per_element(lambda s: s.N * s.config.vocab, 4, 4),
            moved=_logits_traffic,
        ),
        Case(
            op="linear_cross_entropy",
            reference=kernels.linear_cross_entropy_ref,
            ours=kernels.linear_cross_entropy,
            make=_head_inputs,
            leaves=("x", "weight", "bias"),
            flops=lambda s: _gemm_flops(s, s.config.vocab * s.config.channels),
            moved=_head_traffic,
        ),
        Case(
            op="decode_attention",
            reference=kernels.decode_attention_ref,
            ours=kernels.decode_attention,
            make=_decode_inputs,
            leaves=(),
            rows=("q", "k_cache", "v_cache", "lengths"),
            flops=lambda s: {"fwd": 4.0 * s.B * s.T * s.config.channels},
            moved=_decode_traffic,
            graph=True,
        ),
        Case(
            op="decode_block",
            reference=kernels.decode_block_ref,
            ours=kernels.decode_block,
            make=_decode_block_inputs,
            leaves=(),
            flops=lambda s: {"fwd": 2.0 * s.B * (layer_weights(s.config) + 2 * s.T * s.config.channels)},
            moved=_decode_block_traffic,
            graph=True,
        ),
        Case(
            op="decode_head",
            reference=kernels.decode_head_ref,
            ours=kernels.decode_head,
            make=_decode_head_inputs,
            leaves=(),
            flops=lambda s: {"fwd": 2.0 * s.B * s.config.vocab * s.config.channels},
            moved=lambda s, e: {"fwd": float(s.config.vocab * (e * s.config.channels + 4 * s.B))},
            graph=True,
        ),
    )
} | GEMM_CASES

"""Who else can do it: each provider at its best fair setting, imported only when asked for.

Attention peers get a compiled rotary pass of their own and the layout that a model's projections leave, [B,T,H,D] with
contiguous heads; layer peers get the same weights in their own layout; compiled peers compile outside the timing.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from xiangxin_kernels.attention import rotate_half_ref
from xiangxin_kernels.parallel_block import split_projection

from .case import Case, Inputs, Provider, Run, Shape, Unavailable, compiled, of_inputs
from .gemm_cases import GEMM_PEERS
from .hugging_face import layer_peer


def package(name: str) -> ModuleType:
    """The module, or Unavailable."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package built for another torch fails in many ways, none of them ours
        reason = "not installed" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
        raise Unavailable(f"{name}: {reason}") from error


def reference(case: Case, inputs: Inputs, shape: Shape) -> Run:
    return of_inputs(case.reference)(case, inputs, shape)


def compiled_reference(case: Case, inputs: Inputs, shape: Shape) -> Run:
    return of_inputs(compiled(case.reference, shape))(case, inputs, shape)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate_half_ref(q, cos, sin), rotate_half_ref(k, cos, sin)


@functools.cache
def _compiled_rotation(shape: Shape) -> Callable:
    return compiled(_rotate, shape)


def _rotated(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Provider:
    """The provider that rotates q and k in one compiled pass and then calls `attend` on [B,T,H,D]."""

    def provide(case: Case, inputs: Inputs, shape: Shape) -> Run:
        rotate = _compiled_rotation(shape)

        def run(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return attend(*rotate(q, k, cos, sin), v)

        return of_inputs(run)(case, inputs, shape)

    return provide


def _sdpa(backend: SDPBackend) -> Provider:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(
                1, 2
            )

    return _rotated(attend)


def _flex(case: Case, inputs: Inputs, shape: Shape) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    T, device = shape.T, inputs["q"].device
    mask = create_block_mask(causal, None, None, T, T, device=device)

    # One compilation for both, so that the rotation may fuse with whatever inductor likes.
    def run(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = _rotate(q, k, cos, sin)
        return flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)

    return of_inputs(compiled(run, shape))(case, inputs, shape)


def _flash_attn_2(case: Case, inputs: Inputs, shape: Shape) -> Run:
    attend = package("flash_attn").flash_attn_func
    return _rotated(lambda q, k, v: attend(q, k, v, causal=True))(case, inputs, shape)


def _flash_attn_3(case: Case, inputs: Inputs, shape: Shape) -> Run:
    attend = package("flash_attn_interface").flash_attn_func

    def first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, causal=True)
        return out if isinstance(out, Tensor) else out[0]

    return _rotated(first)(case, inputs, shape)


def _xformers(case: Case, inputs: Inputs, shape: Shape) -> Run:
    ops = package("xformers.ops")
    mask = ops.LowerTriangularMask()
    return _rotated(lambda q, k, v: ops.memory_efficient_attention(q, k, v, attn_bias=mask))(case, inputs, shape)


def _sdpa_decode(backend: SDPBackend) -> Provider:
    """One query against the whole cache: the case fills it, so that no mask is needed."""

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
            return F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]

    return of_inputs(run)


def _decode_block(x, ln_w, ln_b, w_in, b_in, w_out, b_out, cos, sin, k_cache, v_cache, positions, *, heads) -> Tensor:
    """A decode step of a layer in plain torch without a host sync; every row stands at the cache's last position."""
    C = x.shape[1]
    p = F.linear(F.layer_norm(x, (C,), ln_w, ln_b, 1e-5), w_in, b_in)[:, None]
    q, k, v, h = split_projection(p, C, heads, cos[-1:], sin[-1:])
    k_cache[:, -1:], v_cache[:, -1:] = k, v
    attended = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k_cache, v_cache)))
    z = torch.cat([attended.transpose(1, 2).flatten(2), F.gelu(h, approximate="tanh")], dim=-1)
    return x + F.linear(z[:, 0], w_out, b_out[0] + b_out[1])


def _compiled_decode_block(case: Case, inputs: Inputs, shape: Shape) -> Run:
    return of_inputs(compiled(_decode_block, shape))(case, inputs, shape)


def _flash_attn_decode(case: Case, inputs: Inputs, shape: Shape) -> Run:
    attend = package("flash_attn").flash_attn_with_kvcache
    lengths = inputs["lengths"].int()

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, **_) -> Tensor:
        return attend(q[:, None], k_cache, v_cache, cache_seqlens=lengths)[:, 0]

    return of_inputs(run)(case, inputs, shape)


def _liger_layer_norm(case: Case, inputs: Inputs, shape: Shape) -> Run:
    function = package("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return of_inputs(lambda x, weight, bias: function.apply(x, weight, bias, 1e-5))(case, inputs, shape)


def _flash_layer_norm(case: Case, inputs: Inputs, shape: Shape) -> Run:
    function = package("flash_attn.ops.triton.layer_norm").layer_norm_fn
    return of_inputs(lambda x, weight, bias: function(x, weight, bias, eps=1e-5))(case, inputs, shape)


def _liger_cross_entropy(case: Case, inputs: Inputs, shape: Shape) -> Run:
    loss = package("liger_kernel.transformers.cross_entropy").LigerCrossEntropyLoss()
    # Liger writes the gradient over the logits, so each forward needs them afresh; the copy is its price here.
    return of_inputs(lambda logits, targets: loss(logits.clone(), targets))(case, inputs, shape)


def _flash_cross_entropy(case: Case, inputs: Inputs, shape: Shape) -> Run:
    function = package("flash_attn.ops.triton.cross_entropy").cross_entropy_loss

    def run(logits: Tensor, targets: Tensor) -> Tensor:
        losses, _ = function(logits, targets)
        return losses.sum() / (targets != -100).sum()

    return of_inputs(run)(case, inputs, shape)


def _torch_chunked_head(case: Case, inputs: Inputs, shape: Shape) -> Run:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    function = F.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions() if hasattr(torch.nn, "LinearCrossEntropyOptions") else {}

    def run(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return function(x, weight, targets, linear_bias=bias, options=options)

    return of_inputs(run)(case, inputs, shape)


def _liger_head(case: Case, inputs: Inputs, shape: Shape) -> Run:
    loss = package("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss()
    return of_inputs(lambda x, weight, bias, targets: loss(weight, x, targets, bias))(case, inputs, shape)


def _cut_cross_entropy(case: Case, inputs: Inputs, shape: Shape) -> Run:
    function = package("cut_cross_entropy").linear_cross_entropy

    def run(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return function(x, weight, targets, bias=bias)

    return of_inputs(run)(case, inputs, shape)


TORCH_COMPILE = "torch.compile"
PEERS: dict[str, dict[str, Provider]] = {
    "layer_norm": {
        "torch": reference,
        TORCH_COMPILE: compiled_reference,
        "Liger": _liger_layer_norm,
        "flash-attn Triton": _flash_layer_norm,
    },
    "attention": {
        "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "FlexAttention": _flex,
        "flash-attn 2": _flash_attn_2,
        "flash-attn 3": _flash_attn_3,
        "xformers": _xformers,
    },
    "gelu_mlp": {"cuBLAS + torch": reference, "cuBLAS + torch.compile": compiled_reference},
    "parallel_block": {
        "transformers": layer_peer(compile=False),
        "transformers + torch.compile": layer_peer(compile=True),
    },
    "cross_entropy": {
        "torch": reference,
        TORCH_COMPILE: compiled_reference,
        "Liger": _liger_cross_entropy,
        "flash-attn Triton": _flash_cross_entropy,
    },
    "linear_cross_entropy": {
        "torch, full logits": reference,
        TORCH_COMPILE: compiled_reference,
        "F.linear_cross_entropy chunked": _torch_chunked_head,
        "Liger": _liger_head,
        "cut-cross-entropy": _cut_cross_entropy,
    },
    "decode_attention": {
        "SDPA flash": _sdpa_decode(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": _sdpa_decode(SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": _sdpa_decode(SDPBackend.EFFICIENT_ATTENTION),
        "SDPA math": _sdpa_decode(SDPBackend.MATH),
        "flash-attn 2": _flash_attn_decode,
    },
    "decode_block": {"torch": of_inputs(_decode_block), TORCH_COMPILE: _compiled_decode_block},
    "decode_head": {"torch": reference, TORCH_COMPILE: compiled_reference},
} | GEMM_PEERS


def peers_of(op: str, against: str) -> dict[str, Provider]:
    """The op's peers whose name holds one of the comma-separated words of `against`; "all" or "none"."""
    words = [] if against == "none" else [word.strip().lower() for word in against.split(",")]
    return {name: peer for name, peer in PEERS[op].items() if any(w == "all" or w in name.lower() for w in words)}

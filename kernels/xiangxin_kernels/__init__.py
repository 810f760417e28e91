"""Triton kernels for the Phi-2 architecture. This is the front door: nothing else of the package is public."""

from ._cpu import linear, prepack, unpacked
from .attention import attention, attention_ref, document_bounds
from .cross_entropy import cross_entropy, cross_entropy_ref, linear_cross_entropy, linear_cross_entropy_ref
from .decode import (
    decode_attention,
    decode_attention_ref,
    decode_block,
    decode_block_ref,
    decode_head,
    decode_head_ref,
)
from .layer_norm import layer_norm, layer_norm_ref
from .mlp import gelu_mlp, gelu_mlp_ref
from .parallel_block import parallel_block, parallel_block_ref
from .quantized import QuantizedWeight, default_group, dequantize, quantize

__all__ = [
    "QuantizedWeight",
    "attention",
    "attention_ref",
    "cross_entropy",
    "cross_entropy_ref",
    "decode_attention",
    "decode_attention_ref",
    "decode_block",
    "decode_block_ref",
    "decode_head",
    "decode_head_ref",
    "default_group",
    "dequantize",
    "document_bounds",
    "gelu_mlp",
    "gelu_mlp_ref",
    "layer_norm",
    "layer_norm_ref",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_ref",
    "parallel_block",
    "parallel_block_ref",
    "prepack",
    "quantize",
    "unpacked",
]

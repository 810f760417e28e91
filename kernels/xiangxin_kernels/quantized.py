"""Weight-only quantization: weights of 8 or 4 bits, activations as they are.

    int8    weight[n, k] = codes[n, k] * scale[n]                 codes in -127..127
    int4    weight[n, k] = (code[n, k] - 8) * scale[n, k // group]        code in 0..15

A scale is rounded to bf16 before the codes are chosen by it. Int8's takes the largest magnitude of the output channel
to 127; int4's takes the number of largest magnitude in the group, with its sign, to -8, so that all 16 codes are used.

Shapes    int8: codes int8 [N, K], scale bf16 [N]
          int4: codes uint8 [N, K/2], element 2j in the low four bits, 2j+1 in the high; scale bf16 [N, K/group]
Source    Gerganov et al. 2023, llama.cpp, for the signed scale of 4 bits
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._host import check

GROUPS = (128, 64, 32)
CHUNK = 1 << 23  # numbers widened at once


class QuantizedWeight(NamedTuple):
    """A weight [N, K] as codes and scales; the module's docstring has their layout."""

    codes: Tensor
    scale: Tensor

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def group(self) -> int:
        """How many numbers along K share a scale."""
        return self.shape[1] if self.bits == 8 else self.shape[1] // self.scale.shape[1]

    @property
    def shape(self) -> torch.Size:
        """[N, K], that of the weight."""
        N, columns = self.codes.shape
        return torch.Size((N, columns * 8 // self.bits))


def default_group(K: int) -> int:
    """The group of an int4 weight with K columns unless another is asked for. ValueError where none divides K."""
    check(K % 32 == 0, f"quantize: expected a multiple of 32 columns for 4 bits, got {K}")
    return 64 if K % 64 == 0 else 32


def quantize(weight: Tensor, bits: int, group: int | None = None) -> QuantizedWeight:
    """The nearest QuantizedWeight to `weight` [N, K]. `group`: 32, 64 or 128, for 4 bits only; default `default_group`.

    Raises ValueError where bits, group and shape do not fit each other.
    """
    check(weight.dim() == 2, f"quantize: expected a weight [N, K], got {list(weight.shape)}")
    check(bits in (8, 4), f"quantize: expected 8 or 4 bits, got {bits}")
    check(bits == 4 or group is None, f"quantize: expected no group with 8 bits, got {group}")
    N, K = weight.shape
    if N > (rows := max(1, CHUNK // max(K, 1))):
        parts = zip(*(quantize(part, bits, group) for part in weight.split(rows)), strict=True)
        return QuantizedWeight(*map(torch.cat, parts))
    wide = weight.float()
    if bits == 8:
        scale = (wide.abs().amax(1) / 127).bfloat16()
        return QuantizedWeight(_nearest(wide, scale[:, None], -127, 127).to(torch.int8), scale)
    group = group or default_group(K)
    check(group in GROUPS, f"quantize: expected a group of 32, 64 or 128, got {group}")
    check(K % group == 0, f"quantize: expected a multiple of the group {group} as K, got {K}")
    wide = wide.view(N, K // group, group)
    extreme = wide.gather(2, wide.abs().argmax(2, keepdim=True))
    scale = (extreme / -8).bfloat16()
    codes = (_nearest(wide, scale, -8, 7) + 8).to(torch.uint8).view(N, K // 2, 2)
    return QuantizedWeight(codes[..., 0] | codes[..., 1] << 4, scale.view(N, K // group))


def _nearest(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The whole numbers in low..high whose products with `scale` are nearest to fp32 `values`; 0 where scale is 0."""
    divisor = torch.where(scale == 0, 1, scale.float())
    return (values / divisor).round_().clamp_(low, high)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The specification: the numbers [N, K] that `weight` stands for, each rounded once to `dtype`."""
    codes, scale = weight
    exact = torch.promote_types(dtype, torch.float32)
    if weight.bits == 8:
        return (codes.to(exact) * scale[:, None]).to(dtype)
    signed = torch.stack([codes & 15, codes >> 4], dim=2).to(exact).sub_(8)
    return (signed.view(*scale.shape, weight.group) * scale[..., None]).to(dtype).view(weight.shape)

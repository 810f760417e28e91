"""Weight-only quantization: weights of 8 or 4 bits, activations as they are.

    int8    weight[n, k] = codes[n, k] * scale[n]                 codes in -127..127
    int4    weight[n, k] = (code[n, k] - 8) * scale[n, k // group]        code in 0..15

A scale is rounded to bf16 before the codes are chosen by it. Int8's takes the largest magnitude of the output channel
to 127; int4's takes the number of largest magnitude in the group, with its sign, to -8, so that all 16 codes are used.

Shapes    int8: codes int8 [N, K], scale bf16 [N]
          int4: codes uint8 [N, K/2], in the order of `_int4_order`; scale bf16 [N, K/group]
Source    Gerganov et al. 2023, llama.cpp, for the signed scale of 4 bits
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._host import check

GROUPS = (128, 64, 32)
# Numbers widened at once: 64 MiB of fp32. Below 32 malloc may keep what is freed, gigabytes over a model.
CHUNK = 1 << 24


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


def int4_run(K: int) -> int:
    """Columns that `_int4_order` mixes: 128, or 64 or 32 where those divide K and more do not."""
    return next(run for run in (128, 64, 32) if K % run == 0)


def _int4_order(numbers: Tensor) -> Tensor:
    """numbers [N, K] in the order in which 4-bit codes are stored: the low four bits of a byte before the high ones.

    That of a tensor core's operand. In a run of 32 n columns a lane of four owns n words: columns 8 lane .. 8 lane + 7
    of each 32. A word, little-endian, holds four even columns and then the four odd ones, so that one mask takes
    neighbours out of it.
    """
    N, K = numbers.shape
    run = int4_run(K)
    return numbers.view(N, K // run, run // 32, 4, 4, 2).permute(0, 1, 3, 2, 5, 4).reshape(N, K)


def _int4_columns(stored: Tensor) -> Tensor:
    """stored [N, K] back in the order of the columns."""
    N, K = stored.shape
    run = int4_run(K)
    return stored.view(N, K // run, 4, run // 32, 2, 4).permute(0, 1, 3, 2, 5, 4).reshape(N, K)


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
        # Room for the whole comes first: parts that are held and joined leave holes that an allocator keeps.
        parts = (quantize(part, bits, group) for part in weight.split(rows))
        whole = QuantizedWeight(*(part.new_empty(N, *part.shape[1:]) for part in quantize(weight[:1], bits, group)))
        for start, part in zip(range(0, N, rows), parts, strict=True):
            for out, values in zip(whole, part, strict=True):
                out[start : start + rows] = values
        return whole
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
    codes = _int4_order((_nearest(wide, scale, -8, 7) + 8).to(torch.uint8).view(N, K)).view(N, K // 2, 2)
    return QuantizedWeight(codes[..., 0] | codes[..., 1] << 4, scale.view(N, K // group))


def int4_codes(weight: QuantizedWeight) -> Tensor:
    """Those of 4 bits one by one, uint8 [N, K], in the order of the columns."""
    return _int4_columns(torch.stack([weight.codes & 15, weight.codes >> 4], dim=2).flatten(1))


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
    signed = int4_codes(weight).to(exact).sub_(8)
    return (signed.view(*scale.shape, weight.group) * scale[..., None]).to(dtype).view(weight.shape)

"""Linear layers for a CPU, fast where it has no bf16 arithmetic, with rows whose bits ignore the batch.

One row against a weight goes at the memory's speed or not, by the layout of the weight and the loop that torch has for
it. Measured on two cores, [1, 2560] x [2560, 17920], 1e9 weights a second, on AVX2 at 28 GB/s and, behind the bar, on
AVX-512 with bf16 products at 50 GB/s:

    bf16    F.linear 8.6    F.embedding_bag over column blocks 11.2 to 11.8  |  17, 22, oneDNN's own layout 25
    int8    torch._weight_int8pack_mm 12.3    the bag 20.4, 1.1 bytes a weight  |  35, the bag 62 (48 of 80 outputs)
    int4    torch._weight_int4pack_mm_for_cpu 12.7    the bag 6.6  |  68
    fp32    F.linear 5.2    torch.bmm over chunks of rows 7.1: MKL shares several products well, one badly

Column blocks: outputs n, in blocks of a register file's width, are the rows of an embedding table, one row for each
(block, k); out[block] is then the bag sum over k of x[k] table[block, k], and torch compiles such sums for the CPU it
runs on. A bag's bits depend on that bag alone.

oneDNN's layout, a tensor of torch's "mkldnn" kind, has k in pairs, as bf16 products take it; any other is brought into
it each time: 32 rows take 4.1 ms there and 6.6 by F.linear, 512 rows 47 and 54. The bits of one row alone do not depend
on the number of threads (1 to 128 were tried); those of several rows do depend on how many they are.
"""

import functools
import math
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._host import INTERPRET
from .quantized import QuantizedWeight, dequantize, int4_codes

# Elements of one widened block, which stays in the caches, and the fewest rows for which widening pays. On one AVX2
# core, [M, 2560] x [2560, 17920]: 512 rows take 0.8 s widened and 4.8 s by torch's own bf16 product, 32 rows 0.11 and
# 0.29 s, 8 rows 65 and 71 ms.
WIDEN_ELEMENTS = 1 << 22
WIDEN_ROWS = 16

# Outputs in a column block: the wider the better, until they leave the registers, of which AVX-512 has four times as
# many. bf16 takes the first that divides N.
BF16_BLOCKS, INT8_BLOCK, WIDE_INT8_BLOCK = (80, 64), 80, 256
INT8_ZERO = 128  # the table's bytes are unsigned
INT4_ROWS = 16  # what torch's int4 weights must be a multiple of
ROW_CHUNKS = 16  # of an fp32 weight; a constant, so that the number of threads changes no bits

_scratch = threading.local()


class PackedWeight(NamedTuple):
    """A quantized weight [N, K] as a CPU reads it best, with N made whole blocks.

    int8: codes uint8 [N/80, K, 88], or [N/256, K, 264] with AVX-512: column blocks, each row with the scale 1 and the
    offset -128 that the bag applies to it; scale bf16 [N]. int4: codes uint8 [N, K/2] in torch's own order; scale bf16
    [K/group, N, 2] with torch's zero points, which are 0.
    """

    codes: Tensor
    scale: Tensor
    rows: int  # N before it was made whole

    @property
    def bits(self) -> int:
        return 8 if self.codes.dim() == 3 else 4

    @property
    def shape(self) -> torch.Size:
        """[N, K], that of the weight."""
        return torch.Size((self.rows, self.codes.shape[1] * 8 // self.bits))


Weight = Tensor | QuantizedWeight | PackedWeight


@functools.cache
def _has_bf16() -> bool:
    """Whether oneDNN has bf16 products for this CPU; without them torch falls back to loops, slower than fp32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def prepack(weight: Weight) -> Weight:
    """`weight` [N, K] laid out anew where this device then decodes faster, else as it came; `linear` takes either.

    On a CPU: a QuantizedWeight becomes a PackedWeight; a bf16 weight an mkldnn tensor where the CPU multiplies bf16,
    else column blocks [N/80, K, 80] or [N/64, K, 64], the first that N allows.
    """
    if isinstance(weight, QuantizedWeight):
        if weight.codes.is_cuda or INTERPRET:
            return weight
        return _pack_int8(weight) if weight.bits == 8 else _pack_int4(weight)
    plain = not isinstance(weight, Tensor) or weight.dtype != torch.bfloat16 or weight.dim() != 2 or weight.is_mkldnn
    if plain or weight.is_cuda or INTERPRET:
        return weight
    if _has_bf16():
        return torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    for block in BF16_BLOCKS:
        if weight.shape[0] % block == 0:
            return weight.unflatten(0, (-1, block)).transpose(1, 2).contiguous()
    return weight


def _pack_int8(weight: QuantizedWeight) -> PackedWeight:
    N, K = weight.shape
    width = WIDE_INT8_BLOCK if _has_avx512() else INT8_BLOCK
    codes = torch.full((-(-N // width), K, width + 8), INT8_ZERO, dtype=torch.uint8)
    codes[..., width:] = torch.tensor([1.0, -INT8_ZERO]).view(torch.uint8)
    for block, rows in zip(codes, weight.codes.split(width), strict=True):
        block[:, : len(rows)] = rows.T.view(torch.uint8) ^ INT8_ZERO
    return PackedWeight(codes, weight.scale, N)


def _pack_int4(weight: QuantizedWeight) -> PackedWeight:
    padding = (0, 0, 0, -len(weight.codes) % INT4_ROWS)
    codes = F.pad(int4_codes(weight).int(), padding)
    scale = F.pad(weight.scale, padding)
    scale = torch.stack([scale, torch.zeros_like(scale)], dim=2).transpose(0, 1).contiguous()
    return PackedWeight(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scale, len(weight.codes))


def weight_shape(weight: Weight) -> torch.Size:
    """[N, K] of a weight in any layout."""
    if isinstance(weight, Tensor) and weight.dim() == 3:
        return torch.Size((weight.shape[0] * weight.shape[2], weight.shape[1]))
    return weight.shape


def unpacked(weight: Tensor) -> Tensor:
    """`weight` as it is, or a plain [N, K] where it was laid out anew; differentiable."""
    if weight.is_mkldnn:
        return weight.to_dense()
    return weight.transpose(1, 2).flatten(0, 1) if weight.dim() == 3 else weight


def next_power_of_2(n: int) -> int:
    """The smallest that is at least `n`, which is above 0."""
    return 1 << (n - 1).bit_length()


def kept(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of this thread's own, in memory that is kept: fresh pages cost more than filling them.

    Memory that is too small is doubled, so that shapes which grow with each token find room.
    """
    name = f"{name} {dtype}"
    size, values = math.prod(shape), getattr(_scratch, name, None)
    if values is None or values.numel() < size:
        with torch.inference_mode(False):  # a tensor born in inference mode could not be written outside of it
            values = torch.empty(next_power_of_2(size), dtype=dtype)
        setattr(_scratch, name, values)
    return values[:size].view(shape)


def linear(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """F.linear of x [..., K] with weight [N, K], in any layout, and bias [N], on any device.

    Without gradients, bf16 weights on a CPU that has no bf16 arithmetic, and int8 weights on any, are widened block by
    block into one scratch that the CPU multiplies fast.
    """
    if isinstance(weight, QuantizedWeight):
        weight = dequantize(weight, x.dtype)
    rows = x.numel() // x.shape[-1]
    if isinstance(weight, PackedWeight):
        flat = x.reshape(rows, -1)
        wide = weight.bits == 8 and rows >= WIDEN_ROWS
        return (_widened(flat, weight, bias) if wide else linear_rows(flat, weight, bias)).view(*x.shape[:-1], -1)
    records = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    plain = x.is_cuda or x.dtype != torch.bfloat16 or records or torch.compiler.is_compiling()
    if plain or (weight.dim() == 2 and not weight.is_mkldnn and (_has_bf16() or rows < WIDEN_ROWS)):
        return F.linear(x, unpacked(weight), bias)
    if weight.is_mkldnn:
        return _onednn(x, weight, bias)
    flat = x.reshape(rows, -1)
    return (linear_rows if rows < WIDEN_ROWS else _widened)(flat, weight, bias).view(*x.shape[:-1], -1)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear with a weight in oneDNN's own layout."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _widened(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor) -> Tensor:
    """x [M, K] times a bf16 or int8 weight, with as much of it at a time as the scratch holds.

    Products are of fp32, or of bf16 where x is and the CPU has them: bf16 holds int8's codes exactly.
    """
    N, K = weight_shape(weight)
    table = weight if isinstance(weight, Tensor) else weight.codes[..., :-8].view(torch.int8)
    if table.dim() == 2:
        table = table[..., None]  # blocks of one output
    blocks, _, width = table.shape
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and _has_bf16() else torch.float32
    wide_x = x.to(dtype)
    out = wide_x.new_empty(len(x), blocks * width)
    for start in range(0, blocks, step := max(1, WIDEN_ELEMENTS // (K * width))):
        part = table[start : start + step]
        if width == 1:
            wide = kept("wide", (len(part), K), dtype).copy_(part[..., 0]).T
        else:
            part = part.transpose(0, 1)
            if isinstance(weight, PackedWeight):  # to signed numbers: cheaper as bytes than once they are wide
                part = torch.bitwise_xor(part, -INT8_ZERO, out=kept("signed", part.shape, torch.int8))
            wide = kept("wide", (K, part.shape[1] * width), dtype)
            wide.view(part.shape).copy_(part)
        torch.mm(wide_x, wide, out=out[:, start * width : (start + step) * width])
    out = out[:, :N].float()
    if isinstance(weight, PackedWeight):
        out *= weight.scale
    return out.add_(bias).to(x.dtype)


@functools.lru_cache(16)
def _bags(bags: int, size: int) -> tuple[Tensor, Tensor]:
    """For `bags` bags of `size` table rows each, one after the other: which rows, and where each bag begins."""
    with torch.inference_mode(False):
        return torch.arange(bags * size, dtype=torch.int32), torch.arange(0, bags * size, size, dtype=torch.int32)


def weighted_sums(table: Tensor, indices: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """The bags [bags, width] of `table` [rows, width]: F.embedding_bag without its checks in Python."""
    return torch.embedding_bag(table, indices, offsets, False, 0, False, factors)[0]


def _product(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor) -> Tensor:
    """F.linear of one row x [K]."""
    if isinstance(weight, Tensor) and weight.is_mkldnn:
        return _onednn(x[None], weight, bias)[0]
    if isinstance(weight, Tensor) and weight.dim() == 2:
        chunks = math.gcd(len(weight), ROW_CHUNKS)
        if x.dtype != torch.float32 or chunks == 1:
            return F.linear(x, weight, bias)
        weight = weight.unflatten(0, (chunks, -1))
        return torch.bmm(x.expand(chunks, 1, -1), weight.transpose(1, 2)).flatten().add_(bias)
    table = weight if isinstance(weight, Tensor) else weight.codes
    blocks, K, width = table.shape
    indices, offsets = _bags(blocks, K)
    table = table.view(blocks * K, width)
    if isinstance(weight, Tensor):
        factors = kept("factors", (blocks, K), torch.bfloat16).copy_(x).view(-1)
        return weighted_sums(table, indices, offsets, factors).view(-1).add_(bias)
    factors = kept("wide", (blocks, K)).copy_(x).view(-1)
    out = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(table, indices, offsets, per_sample_weights=factors)
    return out.view(-1)[: weight.rows].mul_(weight.scale).add_(bias).to(x.dtype)


def linear_rows(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """F.linear of x [B, K] with weight [N, K], in any layout, and bias [N], each row's bits the same whatever B is.

    Matrix products choose their order of summation by the shapes, so every row is a call of its own; but for int4,
    whose op is a loop over rows inside.
    """
    if isinstance(weight, QuantizedWeight):
        weight = dequantize(weight, x.dtype)
    if isinstance(weight, PackedWeight) and weight.bits == 4:
        group = weight.shape[1] // len(weight.scale)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), weight.codes, group, weight.scale)
        return out[:, : weight.rows] + bias
    if len(x) == 1:
        return _product(x[0], weight, bias)[None]
    return torch.stack([_product(row, weight, bias) for row in x])

"""Linear layers for a CPU: widened weights where it has no bf16 arithmetic, and rows whose bits ignore the batch."""

import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one widened block (64 MiB of fp32; smaller ones are no faster, and each ends in barriers) and the
# fewest rows for which widening pays. On one AVX2 core, [M, 2560] x [2560, 17920]: 512 rows take 0.8 s widened and
# 4.8 s by torch's own bf16 product, 32 rows 0.11 and 0.29 s, 8 rows 65 and 71 ms.
WIDEN_ELEMENTS = 1 << 24
WIDEN_ROWS = 16

_scratch = threading.local()


@functools.cache
def _has_bf16() -> bool:
    """Whether oneDNN has bf16 products for this CPU; without them torch falls back to loops, slower than fp32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _wide_scratch(rows: int, columns: int) -> Tensor:
    """fp32 [rows, columns] of this thread's own, in memory that is kept: fresh pages cost more than filling them."""
    if getattr(_scratch, "values", torch.empty(0)).numel() < rows * columns:
        with torch.inference_mode(False):  # a tensor born in inference mode could not be written outside of it
            _scratch.values = torch.empty(rows * columns)
    return _scratch.values[: rows * columns].view(rows, columns)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear of x [..., K] with weight [N, K] and bias [N], on any device.

    Without gradients, on a CPU that has no bf16 arithmetic, bf16 weights are widened block by block into one fp32
    scratch: products and sums are then in fp32, rounded once.
    """
    rows = x.numel() // x.shape[-1]
    records = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    plain = x.is_cuda or x.dtype != torch.bfloat16 or records or torch.compiler.is_compiling()
    if plain or rows < WIDEN_ROWS or _has_bf16():
        return F.linear(x, weight, bias)
    N, K = weight.shape
    wide_x, wide_bias = x.reshape(rows, K).float(), bias.float()
    out = wide_x.new_empty(rows, N)
    step = max(1, WIDEN_ELEMENTS // K)
    for start in range(0, N, step):
        block = slice(start, min(start + step, N))
        wide = _wide_scratch(block.stop - start, K).copy_(weight[block])
        torch.addmm(wide_bias[block], wide_x, wide.T, out=out[:, block])
    return out.to(x.dtype).view(*x.shape[:-1], N)


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear of x [B, K] with weight [N, K] and bias [N], each row's bits being the same whatever B is.

    Matrix products choose their order of summation by the shapes, so every row is a call of its own. In bf16, whose
    conversion and not memory is what the time goes to, sharing each block of the weight among the rows gained nothing;
    blocks of 16 MB cost one row a third of its speed on a busy machine, each ending in a barrier for all threads.
    """
    return torch.cat([F.linear(row, weight, bias) for row in x.split(1)])

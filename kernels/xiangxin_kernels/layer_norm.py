"""LayerNorm over the last axis.

    y    = xhat * weight + bias          xhat = (x - mean) * rstd, rstd = 1 / sqrt(var + eps), biased variance
    g    = dout * weight
    dx   = (g - sum(g) / C - xhat * sum(g * xhat) / C) * rstd (+ dresidual)
    dweight = sum over rows of dout * xhat          dbias = sum over rows of dout

Shapes    x, y, dout, dx, dresidual [..., C]   weight, bias [C]   mean, rstd [N] fp32, N the product of the leading axes
Saves     x, weight, mean, rstd
Method    A program holds a row in registers. The backward strides over rows with a fixed number of programs; each keeps
          its own sums for dweight and dbias, which one more reduction adds up in a fixed order.
Numerics  fp32 throughout, rounded once. The variance takes two passes, and the second corrects the mean of the first
          (Chan, Golub, LeVeque 1983): at mean 1e4 and std 1e-3 that mean alone is off by a standard deviation.
Limits    x, weight and bias of one dtype out of fp32, fp16, bf16; a last axis that is not contiguous is copied.
          Up to C = 8192 a row stays in registers; at 16384 the backward's loop spills some 250 of them: right, but slow
Source    Ba, Kiros, Hinton 2016, arXiv:1607.06450
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._host import as_rows, check, check_dtypes, kernel_op, use_triton
from ._tuning import arch_of, choose_layer_norm


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The specification, in the dtype of `x`. Shapes as in the module's docstring."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride_n,
    y_stride_n,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    x = tl.load(x_ptr + row * x_stride_n + offs_c, mask=mask_c, other=0.0).to(tl.float32)

    mean = tl.sum(x, 0) / C
    centred = tl.where(mask_c, x - mean, 0.0)
    correction = tl.sum(centred, 0) / C
    var = tl.maximum(tl.sum(centred * centred, 0) / C - correction * correction, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))

    # Loaded late: held over the sums they would cost half the registers.
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    y = (centred - correction) * rstd * weight + bias

    tl.store(y_ptr + row * y_stride_n + offs_c, y.to(y_ptr.dtype.element_ty), mask=mask_c)
    tl.store(mean_ptr + row, mean + correction)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _layer_norm_bwd_kernel(
    dout_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    partial_ptr,
    dout_stride_n,
    x_stride_n,
    dresidual_stride_n,
    dx_stride_n,
    N,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)

    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(n, tl.int64)
        dout = tl.load(dout_ptr + row * dout_stride_n + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride_n + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)

        # Beyond C dout is zero, and with it every product that xhat enters there.
        xhat = (x - mean) * rstd
        dweight += dout * xhat
        dbias += dout
        g = dout * weight
        dx = (g - tl.sum(g, 0) / C - xhat * (tl.sum(g * xhat, 0) / C)) * rstd
        if dresidual_ptr is not None:
            dresidual_row = dresidual_ptr + row * dresidual_stride_n
            dx += tl.load(dresidual_row + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * dx_stride_n + offs_c, dx.to(dx_ptr.dtype.element_ty), mask=mask_c)

    dweight_row = partial_ptr + tl.program_id(0).to(tl.int64) * C
    dbias_row = dweight_row + tl.num_programs(0).to(tl.int64) * C
    tl.store(dweight_row + offs_c, dweight, mask=mask_c)
    tl.store(dbias_row + offs_c, dbias, mask=mask_c)


@kernel_op(mutates=("y", "mean", "rstd"))
def _layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> None:
    """x, y [N, C], last axis contiguous; mean, rstd [N] fp32."""
    N, C = x.shape
    config = choose_layer_norm(C, x.dtype, arch_of(x.device))
    if N:
        _layer_norm_fwd_kernel[(N,)](
            x,
            weight,
            bias,
            y,
            mean,
            rstd,
            x.stride(0),
            y.stride(0),
            eps,
            C=C,
            BLOCK_C=config.block_c,
            num_warps=config.fwd_warps,
        )


@kernel_op(mutates=("dx", "partial"))
def _layer_norm_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dresidual: Tensor | None,
    dx: Tensor,
    partial: Tensor,
) -> None:
    """dout, x, dresidual, dx [N, C], last axis contiguous; partial [2, P, C] fp32: dweight and dbias of P programs."""
    N, C = x.shape
    config = choose_layer_norm(C, x.dtype, arch_of(x.device))
    if N:
        _layer_norm_bwd_kernel[(partial.shape[1],)](
            dout,
            x,
            weight,
            mean,
            rstd,
            dresidual,
            dx,
            partial,
            dout.stride(0),
            x.stride(0),
            0 if dresidual is None else dresidual.stride(0),
            dx.stride(0),
            N,
            C=C,
            BLOCK_C=config.block_c,
            num_warps=config.bwd_warps,
        )


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., C], mean [N] and rstd [N] in Triton, for autograd functions that contain a LayerNorm."""
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    _layer_norm_fwd(rows, weight.contiguous(), bias.contiguous(), as_rows(y), mean, rstd, eps)
    return y, mean, rstd


def layer_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., C] (plus dresidual, the gradient that reaches x past the LayerNorm), dweight [C] and dbias [C]."""
    rows = as_rows(x)
    N, C = rows.shape
    programs = min(N, choose_layer_norm(C, x.dtype, arch_of(x.device)).bwd_programs)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty((2, programs, C), dtype=torch.float32, device=x.device)
    dresidual = None if dresidual is None else as_rows(dresidual)
    _layer_norm_bwd(as_rows(dout), rows, weight.contiguous(), mean, rstd, dresidual, as_rows(dx), partial)
    dweight, dbias = partial.sum(dim=1).to(weight.dtype)
    return dx, dweight, dbias


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return *layer_norm_backward(dout, *ctx.saved_tensors), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm of x [..., C] with weight, bias [C]; returns [..., C] in x's dtype.

    Raises ValueError naming the argument whose shape or dtype does not fit.
    """
    check(weight.shape == x.shape[-1:], f"layer_norm: expected weight [{x.shape[-1]}], got {list(weight.shape)}")
    check(bias.shape == x.shape[-1:], f"layer_norm: expected bias [{x.shape[-1]}], got {list(bias.shape)}")
    if not use_triton(x):
        return layer_norm_ref(x, weight, bias, eps)
    check_dtypes("layer_norm", x=x, weight=weight, bias=bias)
    return _LayerNorm.apply(x, weight, bias, eps)

"""The shared device helpers, each against fp64."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from xiangxin_kernels._device import gelu, gelu_and_grad

pytestmark = pytest.mark.interpreter


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, y_again_ptr, slope_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y, slope = gelu_and_grad(x)
    tl.store(y_ptr + offs, y)
    tl.store(y_again_ptr + offs, gelu(x))
    tl.store(slope_ptr + offs, slope)


def test_gelu_and_its_derivative_to_two_ulps():
    """Of |x|, and of 1 for the derivative (torch in fp32: 9). At |x| = 40 a naive form has infinity times 0."""
    x = torch.cat([torch.linspace(-40, 40, 2**15), torch.randn(2**15 - 2), torch.tensor([0.0, 1e-30])])
    y, y_again, slope = torch.empty(3, x.numel())
    _gelu_kernel[(1,)](x, y, y_again, slope, x.numel())
    exact_x = x.double().requires_grad_()
    exact = F.gelu(exact_x, approximate="tanh")
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_x)
    ulp = torch.finfo(torch.float32).eps
    assert torch.equal(y, y_again)
    assert ((y - exact).abs() <= 2 * ulp * torch.exp2(x.double().abs().log2().floor())).all()
    assert ((slope - exact_slope).abs() <= 2 * ulp).all()

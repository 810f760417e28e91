"""GELU MLP.

    h = x w1^T + b1      y = gelu(h) w2^T + b2      gelu(h) = h (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3))) / 2

    dh = (dy w2) gelu'(h)      dx = dh w1      dw1 = dh^T x      dw2 = dy^T gelu(h)      db1, db2: sums of dh, dy

Shapes    x, y [..., C]   h [..., F]   w1 [F, C]   b1 [F]   w2 [C, F]   b2 [C]: weights as nn.Linear holds them
Saves     x, h; the backward makes gelu(h) again where it reads h
Numerics  gemm.py: products accumulate in fp32, GELU and its derivative in fp32
Limits    Triton: one dtype out of fp32, fp16, bf16; last axes and biases that are not contiguous are copied
Source    Hendrycks, Gimpel 2016, arXiv:1606.08415, section 2 ("gelu_new" is its tanh approximation)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._host import as_rows, check, check_dtypes, in_autocast_dtype, use_triton
from .gemm import _linear_gelu, _linear_gelu_bwd, dgelu_row_tiles


def gelu_mlp_ref(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The specification, in the dtype of `x`. Shapes as in the module's docstring."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


class _GeluMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2):
        rows = as_rows(x)
        h, g = x.new_empty(rows.shape[0], len(b1)), x.new_empty(rows.shape[0], len(b1))
        _linear_gelu(rows, as_rows(w1), b1.contiguous(), h, g)
        ctx.save_for_backward(x, w1, b1, w2, b2, h)
        return torch.addmm(b2, g, w2.t()).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, w1, b1, w2, b2, h = ctx.saved_tensors
        dy, rows, hidden = as_rows(dout), as_rows(x), h.shape[1]
        dh, g = torch.empty_like(h), torch.empty_like(h)
        partial = h.new_empty(dgelu_row_tiles(dy, hidden), hidden, dtype=torch.float32)
        _linear_gelu_bwd(dy, as_rows(w2), h, dh, g, partial)
        db1, db2 = partial.sum(0).to(b1.dtype), dy.sum(0, dtype=torch.float32).to(b2.dtype)
        return torch.mm(dh, w1).view(x.shape), torch.mm(dh.t(), rows), db1, torch.mm(dy.t(), g), db2


def gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """GELU MLP of x [..., C] with w1 [F, C], b1 [F], w2 [C, F], b2 [C]; returns [..., C].

    Under autocast all are cast to its dtype, as nn.Linear's would be. Raises ValueError naming the argument whose shape
    or dtype does not fit.
    """
    x, w1, b1, w2, b2 = in_autocast_dtype(x, w1, b1, w2, b2)
    C, hidden = x.shape[-1], w1.shape[0]
    expected = (("w1", w1, (hidden, C)), ("b1", b1, (hidden,)), ("w2", w2, (C, hidden)), ("b2", b2, (C,)))
    for name, tensor, shape in expected:
        check(tensor.shape == shape, f"gelu_mlp: expected {name} {list(shape)}, got {list(tensor.shape)}")
    if not use_triton(x):
        return gelu_mlp_ref(x, w1, b1, w2, b2)
    check_dtypes("gelu_mlp", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    return _GeluMlp.apply(x, w1, b1, w2, b2)

"""GELU MLP.

    y = gelu(x w1^T + b1) w2^T + b2        gelu = the tanh approximation ("gelu_new")

Shapes    x, y [..., C]   w1 [F, C]   b1 [F]   w2 [C, F]   b2 [C]: weights as nn.Linear holds them
Source    Hendrycks, Gimpel 2016, arXiv:1606.08415, section 2
"""

import torch.nn.functional as F
from torch import Tensor

from ._host import check


def gelu_mlp_ref(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The specification, in the dtype of `x`. Shapes as in the module's docstring."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """GELU MLP of x [..., C] with w1 [F, C], b1 [F], w2 [C, F], b2 [C]; returns [..., C]. ValueError on other shapes."""
    (hidden,), C = b1.shape, x.shape[-1]
    check(w1.shape == (hidden, C), f"gelu_mlp: expected w1 [{hidden}, {C}], got {list(w1.shape)}")
    check(w2.shape == (C, hidden), f"gelu_mlp: expected w2 [{C}, {hidden}], got {list(w2.shape)}")
    check(b2.shape == (C,), f"gelu_mlp: expected b2 [{C}], got {list(b2.shape)}")
    return gelu_mlp_ref(x, w1, b1, w2, b2)

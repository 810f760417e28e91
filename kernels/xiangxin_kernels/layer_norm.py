"""LayerNorm over the last axis.

    y = (x - mean) * rstd * weight + bias        rstd = 1 / sqrt(var + eps), biased variance

Shapes    x, y [..., C]   weight, bias [C]   mean, rstd [N] fp32 with N the product of the leading axes
Numerics  statistics and arithmetic in fp32, variance in two passes
Source    Ba, Kiros, Hinton 2016, arXiv:1607.06450
"""

import torch.nn.functional as F
from torch import Tensor

from ._host import check


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The specification, in the dtype of `x`. Shapes as in the module's docstring."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm of x [..., C] with weight, bias [C]; returns [..., C] in x's dtype. ValueError on other shapes."""
    check(weight.shape == x.shape[-1:], f"layer_norm: expected weight [{x.shape[-1]}], got {list(weight.shape)}")
    check(bias.shape == x.shape[-1:], f"layer_norm: expected bias [{x.shape[-1]}], got {list(bias.shape)}")
    return layer_norm_ref(x, weight, bias, eps)

"""Cross-entropy, plain and fused with the projection to the vocabulary.

    loss[n] = lse[n] - logits[n, targets[n]]        lse = log sum exp over V, in fp32
    logits  = x weight^T + bias

Rows whose target is ignore_index count for nothing; "mean" divides by the number of the others, at least 1.

Shapes    logits [N, V]   x [N, C]   weight [V, C]   bias [V] or None   targets [N] int64
"""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy_ref(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """The specification: fp32 (or wider) softmax over the last axis. Shapes as in the module's docstring."""
    wide = logits if logits.element_size() > 4 else logits.float()
    loss = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="none" if reduction == "none" else "sum")
    return loss / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits [N, V] against targets [N]: a scalar, or [N] with reduction="none"."""
    return cross_entropy_ref(logits, targets, ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The specification: the logits, then `cross_entropy_ref`."""
    return cross_entropy_ref(F.linear(x, weight, bias), targets, ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of x [N, C] projected by weight [V, C], bias [V]: a scalar, or [N] with reduction="none"."""
    return linear_cross_entropy_ref(x, weight, bias, targets, ignore_index=ignore_index, reduction=reduction)

"""How likely a model finds given tokens: log-probabilities from sliding windows over texts of any length."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .errors import InputError
from .model import Phi


def token_logprobs(
    model: Phi, tokens: Tensor | Sequence[int], stride: int | None = None, *, valid_ids: int | None = None
) -> Tensor:
    """tokens [T] -> fp32 [T - 1]: the natural log-probability of each token but the first, given those before it.

    A text longer than the model's context is read in windows of the context, `stride` tokens apart (default: half the
    context), and each token is scored in the first window that reaches it: then at least context + 1 - stride tokens
    come before it, or all there are. The softmax is over ids below `valid_ids` (default: all).
    InputError: a stride outside 1..context, no tokens, an id that the model lacks or that is not valid.
    """
    return torch.cat(list(window_logprobs(model, tokens, stride, valid_ids=valid_ids)))


@torch.no_grad()
def window_logprobs(
    model: Phi, tokens: Tensor | Sequence[int], stride: int | None = None, *, valid_ids: int | None = None
) -> Iterator[Tensor]:
    """What `token_logprobs` returns, a window at a time."""
    device = model.embed.device
    valid_ids = min(valid_ids or model.config.vocab, model.config.vocab)
    tokens = torch.as_tensor(tokens, dtype=torch.int64, device=device)
    if tokens.dim() != 1 or not len(tokens):
        raise InputError(f"score: expected tokens [T] with T >= 1, got {list(tokens.shape)}")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < valid_ids:
        raise InputError(f"score: expected ids in 0..{valid_ids - 1}, got {int(tokens.min())}..{int(tokens.max())}")
    scored = 1  # tokens that are done; the first has nothing before it
    for begin, end in _windows(len(tokens) - 1, model.config.context, stride):
        x = model.hidden(tokens[None, begin:end])[0, scored - 1 - begin :]
        targets = tokens[scored : end + 1]
        yield -model.head_loss(x, targets, valid_ids=valid_ids, reduction="none").float()
        scored = end + 1
    if scored == 1:
        yield torch.empty(0, device=device)


def _windows(length: int, context: int, stride: int | None) -> Iterator[tuple[int, int]]:
    """(begin, end) of the windows that read `length` tokens, the last of which reaches the end."""
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride <= context:
        raise InputError(f"stride: expected a whole number in 1..{context} (the model's context), got {stride}")
    begin = end = 0
    while end < length:
        end = min(begin + context, length)
        yield begin, end
        begin += stride

"""From logits to the next token.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p; then the draw. Before all of
them, ids that no token has are removed. Temperature 0 is greedy: the largest penalised logit, the first of equals.

The draw adds Gumbel noise and takes the largest (Gumbel-max, Maddison et al. 2014, arXiv:1411.0030), so a token of
probability zero is never drawn. The noise is a function of (seed, sample, step) alone: what else is in the batch, and
when a sample began, change nothing.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults leave the model's distribution as it is. InputError out of range."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest, and what ties with the last of them; 0: all
    top_p: float = 1.0  # keep the fewest likeliest whose probabilities reach p
    min_p: float = 0.0  # keep what is at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # divides positive logits of tokens already there, multiplies negative ones
    seed: int = 0

    def __post_init__(self):
        def expect(name: str, holds: bool, expectation: str) -> None:
            if not holds:
                raise InputError(f"{name}: expected {expectation}, got {getattr(self, name)}")

        expect("temperature", 0 <= self.temperature < math.inf, "a number >= 0")
        expect("top_k", self.top_k >= 0, "a whole number >= 0")
        expect("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1")
        expect("min_p", 0 <= self.min_p <= 1, "a number in 0..1")
        expect("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number > 0")
        expect("seed", 0 <= self.seed < 2**64, "a whole number in 0..2^64-1")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [B, V] with those of `seen` [B, V] divided by `penalty` where positive, multiplied where negative."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all logits [B, V] below the k-th largest; what ties with it stays."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for the least likely of logits [B, V] whose probabilities together are at most 1 - p; the likeliest stays.

    Of equals at the border the lower ids go first.
    """
    ascending, ids = logits.sort(stable=True)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[:, -1] = False
    return logits.masked_fill(torch.zeros_like(removed).scatter(1, ids, removed), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all logits [B, V] whose probability is below p times the largest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -math.inf)


def process(logits: Tensor, sampling: Sampling, valid_ids: int, seen: Tensor | None = None) -> Tensor:
    """logits [B, V] of any dtype -> fp32 [B, V] that the draw takes; what may not be drawn is -inf.

    `seen` [B, V] marks the tokens of each row's prompt and completion; needed when there is a repetition penalty.
    """
    logits = logits.float()
    logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= valid_ids, -math.inf)
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits
    # The largest becomes 0, so that no temperature above 0, however small, overflows it.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def gumbel(seed: int, sample: int, step: int, V: int) -> Tensor:
    """Standard Gumbel noise [V] in fp64: a function of its arguments, from a counter-based generator keyed by them."""
    key = np.array([seed, sample << 32 | step], dtype=np.uint64)
    noise = np.random.Generator(np.random.Philox(key=key)).standard_exponential(V)
    return torch.from_numpy(noise).log_().neg_()


def choose(logits: Tensor, sampling: Sampling, draws: list[tuple[int, int]]) -> Tensor:
    """One token for each row of processed logits [B, V]; `draws` has each row's (sample, step). int64 [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    noise = [gumbel(sampling.seed, sample, step, logits.shape[-1]) for sample, step in draws]
    scores = logits + torch.stack(noise).to(logits.device)
    return scores.masked_fill(logits == -math.inf, -math.inf).argmax(-1)

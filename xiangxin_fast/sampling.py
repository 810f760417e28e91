"""From logits to the next token, in tensor operations alone: a captured graph can hold all of it.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p; then the draw. Temperature 0 is
greedy: the largest penalised logit, the first of equals.

The draw adds Gumbel noise and takes the largest (Gumbel-max, Maddison et al. 2014, arXiv:1411.0030), so a token of
probability zero is never drawn. The noise is a counter hashed by splitmix64's finaliser (Steele, Lea, Flood 2014,
doi:10.1145/2660193.2660195): a function of (seed, prompt, sample, step, token) alone. What else is in the batch, when a
sample began and on which device it runs change nothing.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1

    @property
    def kind(self) -> tuple[int | bool, ...]:
        """What decides which operations run; Samplings of one kind differ in `numbers` and seed alone."""
        return self.temperature == 0, self.top_k, self.top_p < 1, self.min_p > 0, self.penalizes

    def numbers(self) -> Tensor:
        """fp64 [4] on the CPU: temperature, top_p, min_p, repetition_penalty, as `process` takes them."""
        # Below fp32's smallest number it would become 0 there, and 0 / 0 is not greedy.
        temperature = max(self.temperature, torch.finfo(torch.float32).tiny)
        return torch.tensor([temperature, self.top_p, self.min_p, self.repetition_penalty], dtype=torch.float64)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """logits [B, V] with those of `seen` [B, V] divided by `penalty` where positive, multiplied where negative."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all logits [B, V] below the k-th largest; what ties with it stays."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """-inf for the least likely of logits [B, V] whose probabilities together are at most 1 - p; the likeliest stays.

    Of equals at the border the lower ids go first.
    """
    ascending, ids = logits.sort(stable=True)
    # Added up as whole numbers, which gives the same in any order: a GPU's order depends on the number of rows, and for
    # one row alone on which of its blocks is first.
    sums = (ascending.softmax(-1).double() * 2.0**60).long().cumsum(-1)
    removed = sums.float() * 2.0**-60 <= 1 - p
    removed[:, -1].fill_(False)
    return logits.masked_fill(torch.zeros_like(removed).scatter(1, ids, removed), -math.inf)


def keep_min_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """-inf for all logits [B, V] whose probability is below p times the largest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -math.inf)


def process(logits: Tensor, sampling: Sampling, numbers: Tensor, seen: Tensor | None = None) -> Tensor:
    """logits [B, V] in fp32 -> [B, V] that the draw takes; what may not be drawn is -inf.

    Values come from `numbers`, a Sampling's, on the device of `logits`; `sampling` says only which processors run.
    `seen` [B, V] marks the tokens of each row's prompt and completion; needed when there is a repetition penalty.
    """
    temperature, top_p, min_p, penalty = numbers
    if sampling.penalizes:
        logits = penalize_repetition(logits, seen, penalty)
    if sampling.temperature == 0:
        return logits
    # The largest becomes 0, so that no temperature above 0, however small, overflows it.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, min_p)
    return logits


def _signed(x: int) -> int:
    """The int64 with the low 64 bits of `x`."""
    return (x + 2**63) % 2**64 - 2**63


# splitmix64: the golden-ratio increment and the finaliser's multipliers; another odd constant tells tokens from steps.
_STEP = _signed(0x9E3779B97F4A7C15)
_TOKEN = _signed(0xD1B54A32D192ED03)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def draw_key(seed: int, prompt: Sequence[int], sample: int) -> int:
    """The int64 that `gumbel` takes as the key of all draws of one sample of `prompt`: a hash of the three.

    The prompt is part of it so that different ones do not draw the same noise.
    """
    text = " ".join(str(int(number)) for number in (seed, sample, *prompt))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def gumbel(keys: Tensor, steps: Tensor, V: int) -> Tensor:
    """Standard Gumbel noise [B, V] in fp64 for rows of `keys` and `steps` [B] int64; always finite."""
    x = torch.add(keys, steps, alpha=_STEP)[:, None]
    x = torch.add(x, torch.arange(V, device=keys.device), alpha=_TOKEN)
    # torch shifts int64 arithmetically, so x and its complement meet: that costs one of 64 bits. The finaliser's last
    # shift is left out, since the high bits decide.
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    # From -2^63..2^63 to 2^-53..1 - 2^-53: neither logarithm meets a zero.
    uniform = x.double().mul_(2.0**-64 * (1 - 2.0**-52)).add_(0.5)
    return uniform.log_().neg_().log_().neg_()


def choose(logits: Tensor, sampling: Sampling, keys: Tensor, steps: Tensor) -> Tensor:
    """One token for each row of processed logits [B, V], int64 [B]; keys, steps [B] int64: which draw each row is."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return (logits + gumbel(keys, steps, logits.shape[-1])).argmax(-1)

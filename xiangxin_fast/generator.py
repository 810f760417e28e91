"""Generator: completions of token sequences. It knows ids only; text is generate.py's.

Each prompt is prefilled alone, in fixed chunks; rows of a decode step do not see each other; draws are keyed by sample
and step. So a sample's tokens are the same, bit for bit, whatever else is in the batch and whenever it joined.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import InputError
from .kv_cache import KVCache
from .model import Phi
from .sampling import Sampling, choose, process

PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Step:
    """One new token of one sample. `finish_reason` is None but on a sample's last step: "stop", "length", "context"."""

    sample: int  # which prompt
    token: int
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """The new tokens of one prompt, a stop id included, and why they end."""

    tokens: list[int]
    finish_reason: str


@dataclass
class _Sequence:
    sample: int
    prompt: Sequence[int]
    limit: int  # length, prompt included, at which it ends
    first_logits: Tensor  # [1, V], what follows the prompt
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


class Generator:
    """Completes prompts with `model`. `valid_ids`: ids from here on have no token and are never chosen (default: none).

    At most `rows` samples are decoded together; the others wait, and each takes the place of one that has finished.
    """

    def __init__(self, model: Phi, *, valid_ids: int | None = None, rows: int = 8):
        self.model, self.rows = model, rows
        self.valid_ids = min(valid_ids or model.config.vocab, model.config.vocab)

    def generate(self, prompts: Sequence[Sequence[int]], **options) -> list[list[int]]:
        """The new tokens of each prompt. Options are those of `stream`."""
        return [completion.tokens for completion in self.complete(prompts, **options)]

    def complete(self, prompts: Sequence[Sequence[int]], **options) -> list[Completion]:
        """The new tokens of each prompt and why they end. Options are those of `stream`."""
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons = [""] * len(prompts)
        for step in self.stream(prompts, **options):
            tokens[step.sample].append(step.token)
            reasons[step.sample] = step.finish_reason
        return [Completion(*pair) for pair in zip(tokens, reasons, strict=True)]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> "Stream":
        """Iterates over the new tokens of all prompts as they come, a Step each.

        A sample ends at one of `stop_ids` (default: the model's end of text), after `max_new_tokens`, at `max_length`
        (which counts the prompt) or at the model's context, whatever is first. `sampling.Sampling` tells the rest.
        InputError: an option out of range, an empty prompt, one with an id the model lacks or with no room to go on.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        eos = self.model.config.eos_id
        stops = frozenset(stop_ids if stop_ids is not None else [] if eos is None else [eos])
        limits = [self._limit(i, prompt, max_new_tokens, max_length) for i, prompt in enumerate(prompts)]
        return Stream(self, prompts, limits, sampling, stops)

    def _limit(self, sample: int, prompt: Sequence[int], max_new_tokens: int | None, max_length: int | None) -> int:
        config = self.model.config
        for name, value in (("max_new_tokens", max_new_tokens), ("max_length", max_length)):
            if value is not None and value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")
        if not prompt:
            raise InputError(f"prompt {sample}: expected at least one token, got none")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab:
            wrong = next(token for token in prompt if not 0 <= token < config.vocab)
            raise InputError(f"prompt {sample}: expected ids in 0..{config.vocab - 1}, got {wrong}")
        longest = min(config.context, max_length or config.context)
        if len(prompt) >= longest:
            name = "max_length" if longest < config.context else "the model's context"
            raise InputError(
                f"prompt {sample}: {name} is {longest} tokens and counts the prompt, which has {len(prompt)}"
            )
        return min(longest, len(prompt) + (max_new_tokens or longest))


class Stream(Iterator[Step]):
    """What `Generator.stream` returns. `stop` ends one sample early."""

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        limits: list[int],
        sampling: Sampling,
        stop_ids: frozenset[int],
    ):
        self._model, self._valid_ids = generator.model, generator.valid_ids
        self._sampling, self._stop_ids = sampling, stop_ids
        self._rows = min(generator.rows, len(prompts))
        self._waiting = deque(zip(range(len(prompts)), prompts, limits, strict=True))
        self._active: list[_Sequence] = []  # in the order of the cache's rows
        self._device = self._model.embed.device
        self._cache = KVCache.allocate(
            self._model.config, self._rows, max(limits, default=1), device=self._device, dtype=self._model.embed.dtype
        )
        self._steps = self._run()

    def __next__(self) -> Step:
        return next(self._steps)

    def stop(self, sample: int) -> None:
        """Ends `sample`: no further step of it comes."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] != sample)
        for sequence in self._active:
            if sequence.sample == sample:
                sequence.finish_reason = sequence.finish_reason or "stop"

    def _run(self) -> Iterator[Step]:
        while self._waiting or self._active:
            while self._waiting and len(self._active) < self._rows:
                self._admit(*self._waiting.popleft())
                yield from self._advance(self._active[-1:], self._active[-1].first_logits)
            if self._active:
                cache = self._cache.rows(0, len(self._active))
                tokens = torch.tensor([sequence.tokens[-1] for sequence in self._active], device=self._device)
                positions = torch.tensor([sequence.length - 1 for sequence in self._active], device=self._device)
                yield from self._advance(self._active, self._model.decode(tokens, cache, positions))

    def _admit(self, sample: int, prompt: Sequence[int], limit: int) -> None:
        """Gives a prompt the next row. One that a row still holds is copied from there: same tokens, same bits."""
        row = len(self._active)
        for twin, sequence in enumerate(self._active):
            if sequence.prompt == prompt:
                self._cache.copy_row(twin, row, len(prompt))
                self._active.append(_Sequence(sample, prompt, limit, sequence.first_logits))
                return
        tokens, cache = torch.tensor([prompt], device=self._device), self._cache.rows(row, row + 1)
        for start in range(0, len(prompt), PREFILL_CHUNK):
            logits = self._model.prefill(tokens[:, start : start + PREFILL_CHUNK], cache, start)
        self._active.append(_Sequence(sample, prompt, limit, logits))

    def _advance(self, sequences: list[_Sequence], logits: Tensor) -> Iterator[Step]:
        """Chooses the next token of each of `sequences` from logits [B, V]; frees the rows of what has finished."""
        if logits.isnan().any():
            raise InputError("the model gave NaN instead of logits: its weights are damaged")
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = torch.zeros(logits.shape, dtype=torch.bool)
            for row, sequence in enumerate(sequences):
                seen[row, list(sequence.prompt)] = True
                seen[row, sequence.tokens] = True
            seen = seen.to(logits.device)
        draws = [(sequence.sample, len(sequence.tokens)) for sequence in sequences]
        processed = process(logits, self._sampling, self._valid_ids, seen)
        for sequence, token in zip(list(sequences), choose(processed, self._sampling, draws).tolist(), strict=True):
            if sequence.finish_reason:  # stopped while others of this step were handed out
                continue
            sequence.tokens.append(token)
            sequence.finish_reason = self._reason(sequence)
            yield Step(sequence.sample, token, sequence.finish_reason)
        for row in reversed(range(len(self._active))):
            if self._active[row].finish_reason:
                self._release(row)

    def _reason(self, sequence: _Sequence) -> str | None:
        if sequence.tokens[-1] in self._stop_ids:
            return "stop"
        if sequence.length == sequence.limit:
            return "context" if sequence.limit == self._model.config.context else "length"
        return None

    def _release(self, row: int) -> None:
        """Moves the last row to where `row` was: the active ones stay together."""
        last = self._active.pop()
        if row < len(self._active):
            self._cache.copy_row(len(self._active), row, last.length - 1)
            self._active[row] = last

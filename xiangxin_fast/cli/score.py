"""How likely a model finds given texts: `--score`."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from xiangxin_fast.errors import InputError
from xiangxin_fast.memory import free_bytes, gigabytes, lacks_memory
from xiangxin_fast.score import window_logprobs

from .complete import token_bar, write_json_line, write_line
from .prompts import Record, Refused

if TYPE_CHECKING:
    from .arguments import Arguments
    from .engine import Engine


@dataclass(frozen=True)
class Score:
    """What scored tokens and the characters that end in them add up to."""

    tokens: int
    characters: int
    logprob: float  # natural

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.tokens + other.tokens, self.characters + other.characters, math.fsum((self.logprob, other.logprob))
        )

    @property
    def perplexity(self) -> float:
        """Per token; infinite where no float holds it."""
        loss = -self.logprob / self.tokens
        return math.exp(loss) if loss < 700 else math.inf

    @property
    def bits_per_character(self) -> float:
        """Infinite without a character, as for the first bytes of one."""
        return -self.logprob / math.log(2) / self.characters if self.characters else math.inf

    def as_json(self) -> dict[str, object]:
        """For JSON, which has no infinity: null."""
        derived = {"perplexity": self.perplexity, "bits_per_character": self.bits_per_character}
        finite = {name: value if math.isfinite(value) else None for name, value in derived.items()}
        return {"scored_tokens": self.tokens, "scored_characters": self.characters, "logprob": self.logprob} | finite

    def __str__(self) -> str:
        size = f"{self.tokens} tokens, {self.characters} characters"
        figures = f"perplexity {self.perplexity:.4f}, {self.bits_per_character:.4f} bits/character"
        return f"log-probability {self.logprob:.4f}, {figures} ({size})"


def score_records(engine: "Engine", records: Sequence[Record], arguments: "Arguments", refused: Refused) -> None:
    """Prints the score of each record as it is known, then that of all together."""
    inputs = []
    for record in records:
        try:
            inputs.append((record, *_tokens(engine, record)))
        except InputError as error:
            if arguments.input is None:
                raise
            refused.add(error)
    total = Score(0, 0, 0.0)
    with token_bar("Scoring", sum(len(tokens) - 1 for _, tokens, _ in inputs), not sys.stdout.isatty()) as advance:
        for record, tokens, first in inputs:
            logprobs = _logprobs(engine, tokens, arguments.stride, advance)[first - 1 :]
            score = Score(len(logprobs), _characters(engine, tokens, first), math.fsum(logprobs))
            if not math.isfinite(score.logprob):
                raise InputError(f"{record.where}: the model gave {score.logprob} for it: its weights are damaged")
            total += score
            if arguments.json:
                write_json_line(sys.stdout, _described(record, tokens[first:], logprobs) | score.as_json())
            else:
                write_line(sys.stdout, f"{record.where}: {score}")
    if arguments.json:
        write_json_line(sys.stdout, {"total": len(inputs)} | (total.as_json() if inputs else {}))
    elif len(inputs) > 1:
        write_line(sys.stdout, f"all {len(inputs)}: {total}")


def _logprobs(engine: "Engine", tokens: list[int], stride: int | None, advance: Callable[[int], None]) -> list[float]:
    """Of each token but the first. InputError where memory is short: what is needed, and what would fit."""
    parts, model = [], engine.model
    try:
        for part in window_logprobs(model, tokens, stride, valid_ids=len(engine.tokenizer)):
            parts.append(part.double().cpu())
            advance(len(part))
        return torch.cat(parts).tolist()
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # Out of the handler: the error holds on to what was allocated until then.
    config, dtype, device = model.config, model.embed.dtype, model.embed.device
    layer, logits = (7 * config.channels + 2 * config.mlp_hidden) * dtype.itemsize, config.vocab * (dtype.itemsize + 8)
    window, free = min(len(tokens) - 1, config.context), free_bytes(device)
    fewer = min(free // (layer + logits), window - 1)
    raise InputError(
        f"--score: {window} tokens at once need about {gigabytes(window * (layer + logits))} beside the weights, got "
        f"{gigabytes(free)} free on {device}: a text of {fewer} tokens would fit ({reason})"
    )


def _tokens(engine: "Engine", record: Record) -> tuple[list[int], int]:
    """All tokens of a record, and the index of the first that is scored."""
    before = engine.tokenizer.encode(record.prompt or "")
    tokens, first = [*before, *record.encode(engine.tokenizer)], max(len(before), 1)
    if len(tokens) <= first:
        least = "one token after its prompt" if before else "two tokens (the first has nothing before it)"
        raise InputError(f"{record.where}: expected at least {least}, got {len(tokens) - len(before)}")
    wrong = next((token for token in tokens if not 0 <= token < len(engine.tokenizer)), None)
    if wrong is not None:
        raise InputError(f"{record.where}: expected ids in 0..{len(engine.tokenizer) - 1}, got {wrong}")
    return tokens, first


def _characters(engine: "Engine", tokens: list[int], first: int) -> int:
    """Characters that the tokens from `first` on complete: of one that two tokens share, the second has it."""
    decoder = engine.tokenizer.stream()
    before = sum(len(decoder.push(token)) for token in tokens[:first])
    return len(engine.tokenizer.decode(tokens)) - before


def _described(record: Record, tokens: list[int], logprobs: list[float]) -> dict[str, object]:
    given = {} if record.text is None else {"text": record.text}
    given |= {} if record.prompt is None else {"prompt": record.prompt}
    return {"id": record.id} | given | {"tokens": tokens, "logprobs": [round(value, 8) for value in logprobs]}

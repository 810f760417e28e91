"""How fast a model generates: seconds to the first token, prefill, decode, and what decoding must read for it.

Whoever is measured takes turns with the others on the same prompts, new ones in every round, so that clocks, heat and
neighbours fall on all alike and nothing of an earlier turn can be used again. Times are those of whoever waits for the
tokens: from the call to the arrival of each token on the host.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import PhiConfig
from .errors import InputError
from .generator import Generator
from .memory import free_bytes
from .model import Phi

Arrivals = list[tuple[float, int]]  # for each token, seconds since the call and the sequence it belongs to
Run = Callable[[list[list[int]], int], Arrivals]  # prompts, new tokens for each


@dataclass(frozen=True)
class Contender:
    """Who is measured, and what each of its decode steps must read."""

    run: Run
    config: PhiConfig
    weight_bytes: int  # every weight but the embedding, of which a step looks up a row
    cache_itemsize: int

    def step_bytes(self, rows: int, positions: float) -> float:
        """Bytes of the weights, and of the keys and values of `rows` sequences of so many positions on average."""
        return (
            self.weight_bytes + 2 * self.config.layers * self.config.channels * self.cache_itemsize * rows * positions
        )


def _weight_bytes(model: nn.Module, embedding: Tensor, tied: bool) -> int:
    """Bytes of all weights, tuples of tensors where they are quantized; the embedding only where it is the head too."""
    owned = (value for module in model.modules() for value in vars(module).values() if isinstance(value, tuple))
    quantized = (part for value in owned for part in value if isinstance(part, Tensor))
    total = sum(t.numel() * t.element_size() for t in itertools.chain(model.parameters(), model.buffers(), quantized))
    return total if tied else total - embedding.numel() * embedding.element_size()


def ours(model: Phi, rows: int) -> Contender:
    """Greedy completions by our generator, of at most `rows` prompts at a time.

    `model`: as no generator has had it, which on a CPU lays weights out anew, with padding that is no use to anyone.
    """
    weights = _weight_bytes(model, model.embed, model.config.tied_head)
    generator = Generator(model, rows=rows)

    def run(prompts: list[list[int]], new_tokens: int) -> Arrivals:
        begin = time.perf_counter()
        stream = generator.stream(prompts, max_new_tokens=new_tokens, temperature=0, stop_ids=())
        return [(time.perf_counter() - begin, step.sample) for step in stream]

    return Contender(run, model.config, weights, model.embed.element_size())


class _Arrivals:
    """A streamer of transformers': it is given the prompts, then a token of each sequence at a time."""

    def __init__(self):
        self.at: list[float] = []

    def put(self, value) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers(hf: nn.Module, config: PhiConfig) -> Contender:
    """Greedy completions by transformers' `generate`."""
    hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = None, 0

    def run(prompts: list[list[int]], new_tokens: int) -> Arrivals:
        streamer, begin = _Arrivals(), time.perf_counter()
        tokens = torch.tensor(prompts, device=hf.device)
        with torch.inference_mode():
            hf.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                do_sample=False,
                streamer=streamer,
            )
        return [(at - begin, row) for at in streamer.at[1:] for row in range(len(prompts))]

    embedding = hf.get_input_embeddings().weight
    return Contender(run, config, _weight_bytes(hf, embedding, config.tied_head), embedding.element_size())


@dataclass(frozen=True)
class Turn:
    """One turn in seconds: to the first token, to the first token of the last sequence, and for a decode step."""

    first: float
    prefill: float
    step: float | None  # None when a turn is of one token each

    @staticmethod
    def of(arrivals: Arrivals, rows: int, new_tokens: int) -> "Turn":
        """A decode step's time: that from the end of the prefill, over the tokens for each sequence since."""
        if len(arrivals) != rows * new_tokens:
            raise RuntimeError(f"benchmark: expected {rows} x {new_tokens} tokens, got {len(arrivals)}")
        first_of: dict[int, float] = {}
        for at, row in arrivals:
            first_of.setdefault(row, at)
        prefill, end = max(first_of.values()), arrivals[-1][0]
        decoded = sum(at > prefill for at, _ in arrivals)
        return Turn(arrivals[0][0], prefill, (end - prefill) * rows / decoded if decoded else None)


@dataclass(frozen=True)
class Spread:
    """Median and extremes of several turns."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Measured:
    """The turns of one run at one size, the one that warms up left out."""

    rows: int
    prompt_tokens: int
    new_tokens: int
    turns: list[Turn]

    @property
    def first(self) -> Spread:
        """Seconds to the first token."""
        return Spread.of([turn.first for turn in self.turns])

    @property
    def prefill(self) -> Spread:
        """Seconds until every sequence has its first token."""
        return Spread.of([turn.prefill for turn in self.turns])

    @property
    def step(self) -> Spread | None:
        """Seconds of a decode step; None where there was none."""
        steps = [turn.step for turn in self.turns if turn.step is not None]
        return Spread.of(steps) if steps else None

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.rows * self.prompt_tokens / self.prefill.median

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.rows / self.step.median if self.step else None

    def bytes_per_s(self, contender: Contender) -> float | None:
        """What a decode step of `contender` must read, over the time of one; None where there was none."""
        moved = contender.step_bytes(self.rows, self.prompt_tokens + self.new_tokens / 2)
        return moved / self.step.median if self.step else None


def measure(
    contenders: dict[str, Contender],
    *,
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    seconds: float = math.inf,
    after_turn: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Lets `contenders` take turns on random prompts; what each took, and for those that could not run the reason.

    After a round that warms up come `rounds`, or as many as begin within `seconds`, but one at least.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    config = next(iter(contenders.values())).config
    failed: dict[str, str] = {}
    begin = time.perf_counter()
    for index in range(rounds + 1):
        if index > 1 and time.perf_counter() - begin > seconds:
            break
        prompts = random_prompts(config, rows, prompt_tokens, seed=index)
        for name in sorted(contenders, reverse=index % 2 == 1):
            if name not in failed:
                try:
                    turn = Turn.of(contenders[name].run(prompts, new_tokens), rows, new_tokens)
                    turns[name] += [turn] if index else []
                except Exception as error:  # memory, or a peer that does not get on with this machine
                    known = isinstance(error, InputError)
                    failed[name] = str(error) if known else f"{type(error).__name__}: {error}".splitlines()[0]
            after_turn()
    done = {name: turns[name] for name in contenders if name not in failed}
    return {name: Measured(rows, prompt_tokens, new_tokens, found) for name, found in done.items()}, failed


def random_prompts(config: PhiConfig, rows: int, tokens: int, seed: int) -> list[list[int]]:
    """`rows` prompts; no two begin alike, so that none can be spared."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(config.vocab, (rows, tokens), generator=generator)
    prompts[:, 0] = torch.randperm(config.vocab, generator=generator)[:rows]
    return prompts.tolist()


def random_model(config: PhiConfig, device: torch.device, dtype: torch.dtype) -> Phi:
    """Phi with random weights, soon there: one draw of noise again and again, LayerNorms around one."""
    model = Phi(config, device=device, dtype=dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.empty(1 << 24, device=device).normal_(0, config.init_std, generator=generator).to(dtype)
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), noise.numel()):
            part = flat[start : start + noise.numel()]
            part.copy_(noise[: part.numel()])
        if name.endswith("ln_w"):
            flat.add_(1.0)
    return model


def copy_bytes_per_s(device: torch.device, copy_bytes: int | None = None, repeats: int = 7) -> float:
    """Bytes read plus bytes written by copies in the device's memory, per second: the median of `repeats`.

    `copy_bytes`: of one copy; default 2 GiB on a GPU and 512 MiB on a CPU, far beyond any cache, but no more than a
    quarter of the free memory.
    """
    most = min(2 << 30 if device.type == "cuda" else 512 << 20, free_bytes(device) // 4)
    source = torch.ones(copy_bytes or most, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * source.numel() / statistics.median(seconds[1:])

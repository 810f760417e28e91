"""Generator: completions of token sequences. It knows ids only; text is generate.py's.

Each prompt is prefilled alone, in fixed chunks; rows of a decode step do not see each other; draws are keyed by prompt
and step. So a sample's tokens are the same, bit for bit, whatever else is in the batch and whenever it joined.

The host schedules: which prompt takes which slot, which slots a step serves, what ends. It runs ahead of the device by
LAG steps and never waits for a token in order to launch what comes next, so it learns late that a sample has ended;
what such a sample got since is thrown away.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .decode_batch import MAX_ROWS, PREFILL_CHUNK, DecodeBatch, Emitted, Record
from .errors import InputError
from .memory import lacks_memory
from .model import Phi, refuse_fp16
from .sampling import Sampling

# Steps launched before the results of one are read. A CPU computes while it launches: there a lag is work for nothing.
LAG = {"cuda": 1, "cpu": 0}
LEAST_POSITIONS = 256  # of a cache; from there it grows by doubling


@dataclass(frozen=True)
class Step:
    """One new token of one sample. `finish_reason` is None but on a sample's last step: "stop", "length", "context"."""

    sample: int  # which prompt
    token: int
    logprob: float  # natural, under the model's own distribution over the valid ids: no penalty, temperature or filter
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """The new tokens of one prompt, a stop id included, their log-probabilities, and why they end."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


class Generator:
    """Completes prompts with `model`. `valid_ids`: ids from here on have no token and are never chosen (default: none).

    At most `rows` samples (1..32) are decoded together; the others wait, and each takes the place of one that has
    finished. A model in evaluation mode has its weights laid out anew where it then decodes faster (`Phi.prepack`);
    one that is being trained keeps its own. Cache and buffers are kept for the next call and grow only when one needs
    more. Prompts that begin alike share the work of prefilling whole chunks within one call, not across calls: the
    weights may have changed since.
    """

    def __init__(self, model: Phi, *, valid_ids: int | None = None, rows: int = 8):
        if not 1 <= rows <= MAX_ROWS:
            raise InputError(f"rows: expected 1..{MAX_ROWS} samples to decode together, got {rows}")
        self.model, self.rows = model if model.training else model.prepack(), rows
        self.valid_ids = min(valid_ids or model.config.vocab, model.config.vocab)
        self._idle: DecodeBatch | None = None

    def generate(self, prompts: Sequence[Sequence[int]], **options) -> list[list[int]]:
        """The new tokens of each prompt. Options are those of `stream`."""
        return [completion.tokens for completion in self.complete(prompts, **options)]

    def complete(self, prompts: Sequence[Sequence[int]], **options) -> list[Completion]:
        """The new tokens of each prompt and why they end. Options are those of `stream`."""
        steps: list[list[Step]] = [[] for _ in prompts]
        for step in self.stream(prompts, **options):
            steps[step.sample].append(step)
        return [Completion([s.token for s in of], [s.logprob for s in of], of[-1].finish_reason) for of in steps]

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
        lookup: int = 0,
    ) -> "Stream":
        """Iterates over the new tokens of all prompts as they come, a Step each.

        A prompt gets what it would get alone. Given several times it gets, in order, the samples 0, 1, 2 ... that it
        would get given as often alone: with a temperature above 0 they differ.

        A sample ends at one of `stop_ids` (default: the model's end of text), after `max_new_tokens`, at `max_length`
        (which counts the prompt) or at the model's context, whatever is first. `sampling.Sampling` tells the rest.

        `lookup`: so many tokens (0..31) are guessed from the text so far and verified in each step. The completions are
        the same; on a GPU, which reads the weights once for all of them, they come sooner where text repeats itself. A
        CPU computes row by row and loses by it.

        InputError: an option out of range, an empty prompt, one with an id the model lacks or with no room to go on;
        while it runs, too little memory, or a model whose logits are not numbers.
        """
        refuse_fp16(self.model.embed.dtype)
        device = self.model.embed.device.type
        if device not in LAG:
            raise InputError(f"Generator: expected a model on {' or '.join(LAG)}, got one on {device}")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        if not 0 <= lookup < MAX_ROWS:
            raise InputError(f"lookup: expected 0..{MAX_ROWS - 1} tokens, got {lookup}")
        eos = self.model.config.eos_id
        stops = frozenset(stop_ids if stop_ids is not None else [] if eos is None else [eos])
        limits = [self._limit(i, prompt, max_new_tokens, max_length) for i, prompt in enumerate(prompts)]
        return Stream(self, prompts, limits, sampling, stops, lookup)

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

    def _take_batch(self, slots: int, positions: int) -> DecodeBatch:
        """A batch with the room asked for: the one kept from the last call where it fits, else one that fits both."""
        kept, self._idle = self._idle, None
        if kept is not None and kept.fits(slots, positions):
            return kept
        positions = min(max(LEAST_POSITIONS, 1 << (positions - 1).bit_length()), self.model.config.context)
        both = (slots, positions) if kept is None else (max(slots, kept.slots), max(positions, kept.cache.positions))
        del kept
        try:
            return DecodeBatch(self.model, *both, self.valid_ids)
        except InputError:
            if both == (slots, positions):
                raise
        return DecodeBatch(self.model, slots, positions, self.valid_ids)

    def _keep_batch(self, batch: DecodeBatch | None) -> None:
        self._idle = batch


@dataclass
class _Sequence:
    sample: int
    prompt: Sequence[int]
    limit: int  # length, prompt included, at which it ends
    slot: int
    tokens: list[int] = field(default_factory=list)
    launched: int = 0  # records of it that were not read yet; each will have a token at least
    finish_reason: str | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class _Prefilled:
    """What a slot's cache begins with, sequences that have ended included, and the logits [1, V] of what follows."""

    prompt: Sequence[int]
    logits: Tensor

    def shared(self, prompt: Sequence[int], chunk: int) -> int:
        """Positions whose keys and values have the bits that `prompt` would give them: all, or whole chunks.

        The last chunk is run in any case where `prompt` goes on otherwise: its logits are needed.
        """
        if self.prompt == prompt:
            return len(prompt)
        pairs = enumerate(zip(self.prompt, prompt, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(self.prompt), len(prompt)))
        return min(same, len(prompt) - 1) // chunk * chunk


def _copies(prompts: Sequence[Sequence[int]]) -> Iterator[int]:
    """Of each prompt, how many equal ones come before it."""
    seen: Counter[tuple[int, ...]] = Counter()
    for prompt in prompts:
        key = tuple(prompt)
        yield seen[key]
        seen[key] += 1


class Stream(Iterator[Step]):
    """What `Generator.stream` returns. `stop` ends one sample early."""

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        limits: list[int],
        sampling: Sampling,
        stop_ids: frozenset[int],
        lookup: int,
    ):
        self.drafted = 0  # tokens that prompt lookup guessed so far
        self.accepted = 0  # those of them that were right
        self._generator, self._sampling, self._stop_ids, self._lookup = generator, sampling, stop_ids, lookup
        self._context, device = generator.model.config.context, generator.model.embed.device.type
        self._chunk, self._lag = PREFILL_CHUNK[device], LAG[device]
        self._slots = min(generator.rows, len(prompts), MAX_ROWS // (1 + lookup))
        self._positions = max(limits, default=1)
        self._waiting = deque(zip(range(len(prompts)), prompts, limits, _copies(prompts), strict=True))
        self._active: list[_Sequence] = []
        self._prefilled: dict[int, _Prefilled] = {}  # by slot
        self._records: deque[tuple[list[_Sequence], Record]] = deque()  # launched and not read, oldest first
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
        if not self._waiting:
            return
        batch, reason = self._generator._take_batch(self._slots, self._positions), None
        try:
            batch.configure(self._sampling, self._lookup)
            while self._waiting or self._active:
                while self._waiting and len(self._active) < self._slots:
                    self._admit(batch, *self._waiting.popleft())
                    yield from self._read(self._lag)
                going_on = [s for s in self._active if s.length + s.launched < s.limit]
                if going_on:
                    self._launched(going_on, batch.step([sequence.slot for sequence in going_on]))
                yield from self._read(self._lag if going_on else 0)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        finally:
            self._generator._keep_batch(batch if reason is None else None)  # a smaller one may fit
        if reason is not None:  # out of the handler: the error holds on to what was allocated until then
            raise InputError(f"{batch.short_of_memory()} ({reason})")

    def _admit(self, batch: DecodeBatch, sample: int, prompt: Sequence[int], limit: int, copy: int) -> None:
        """Gives a prompt a free slot. What a slot already has of it is copied from there: same tokens, same bits."""
        taken = {sequence.slot for sequence in self._active}
        shared = {slot: held.shared(prompt, self._chunk) for slot, held in self._prefilled.items()}
        free = [slot for slot in range(self._slots) if slot not in taken]
        source = max(shared, key=shared.get, default=None)
        # A free slot with the prompt's beginning needs no copy; of the others, the one that gives up least.
        slot = max(free, key=lambda slot: (shared.get(slot, 0), slot not in self._prefilled))
        start = shared[source] if source is not None else 0
        if start > shared.get(slot, 0):
            batch.cache.copy_row(source, slot, start)
        logits = batch.prefill(slot, prompt, start) if start < len(prompt) else self._prefilled[source].logits
        self._prefilled[slot] = _Prefilled(prompt, logits)
        sequence = _Sequence(sample, prompt, limit, slot)
        self._active.append(sequence)
        self._launched([sequence], batch.begin(slot, prompt, limit, copy, logits))

    def _launched(self, sequences: list[_Sequence], record: Record) -> None:
        self._records.append((sequences, record))
        for sequence in sequences:
            sequence.launched += 1

    def _read(self, lag: int) -> Iterator[Step]:
        """Hands out what the launched steps gave, but for the last `lag` of them; frees the slots of what has ended."""
        while len(self._records) > lag:
            sequences, record = self._records.popleft()
            for sequence, emitted in zip(sequences, record.read(), strict=True):
                sequence.launched -= 1
                yield from self._append(sequence, emitted)
            self._active = [sequence for sequence in self._active if not sequence.finish_reason]

    def _append(self, sequence: _Sequence, emitted: Emitted) -> Iterator[Step]:
        if sequence.finish_reason or not emitted.tokens:  # launched before the end was known
            return
        self.drafted += emitted.drafted
        self.accepted += len(emitted.tokens) - 1
        for token, logprob in zip(emitted.tokens, emitted.logprobs, strict=True):
            if sequence.finish_reason:
                return
            if logprob != logprob:
                raise InputError("the model gave NaN instead of logits: its weights are damaged")
            sequence.tokens.append(token)
            sequence.finish_reason = self._reason(sequence)
            yield Step(sequence.sample, token, logprob, sequence.finish_reason)

    def _reason(self, sequence: _Sequence) -> str | None:
        if sequence.tokens[-1] in self._stop_ids:
            return "stop"
        if sequence.length == sequence.limit:
            return "context" if sequence.limit == self._context else "length"
        return None

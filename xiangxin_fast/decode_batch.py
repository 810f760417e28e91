"""DecodeBatch: sequences that are decoded together, and the step that gives each of them its next tokens.

A step is device work alone: draft, decode, process, draw, append. It reads which sequences take part and where each
stands from static buffers and writes there what follows, so on a GPU it is captured once for every size of a batch and
then replayed, while the host collects what came out a step later. On a CPU the same function runs as it is.

A sequence lives in a slot: a row of the cache and of every buffer here. The rows of a step are slots in any order, so
sequences come and go without anything being moved. A graph of n rows serves fewer: the last is repeated, and equal rows
write equal bits. In the same way what is no draft, or one past its sequence's end, repeats the row before the drafts.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .kv_cache import KVCache, too_little_memory
from .memory import free_bytes, lacks_memory
from .model import Phi
from .prompt_lookup import draft
from .sampling import Sampling, choose, draw_key, process

ROW_BUCKETS = (1, 2, 4, 8, 16, 32)
MAX_ROWS = ROW_BUCKETS[-1]  # of one decode step; the decode kernels go no further

# Tokens of a prompt that are prefilled at once. A constant, so that a prompt's bits do not depend on its company. 1024
# keeps the tiles of a layer's second product, 2560 columns wide, numerous enough for a GPU's multiprocessors; on a CPU
# 512 are as fast a token as more, and less of a chunk is lost where prompts part within one.
PREFILL_CHUNK = {"cuda": 1024, "cpu": 512}
CAPTURES = {"cuda"}  # devices on which a step becomes a graph

SAMPLING_BYTES = 40  # of each logit: as it came, as it is processed, sorted with its index, and their softmax and sums
LIBRARY_BYTES = {"cuda": 256 << 20}  # of modules, cuBLAS's workspace and graphs: a reserve, not measured

# Columns of the logits that are drawn from are made whole fours: a GPU's softmax adds a row up in an order that depends
# on how far its first number is from a multiple of 16 bytes, and so, without this, on its place in the batch.
ALIGNED_COLUMNS = 4


class Emitted(NamedTuple):
    """What one step gave one sequence."""

    tokens: list[int]
    logprobs: list[float]  # natural, under the model's own distribution
    drafted: int  # tokens that prompt lookup proposed; all of `tokens` but the last are those it got right


class Record:
    """The results of one step on their way to the host: `read` waits for them, and nothing does before."""

    def __init__(self, values: Tensor, rows: int):
        """`values` [n, 2 + 2K] fp64, in which ids are exact: tokens there are, tokens drafted, K tokens, K logprobs."""
        self._rows, self._arrived = rows, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values = values.clone()

    def read(self) -> list[Emitted]:
        """One for each row of the step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        emitted = []
        for count, drafted, *values in self._values[: self._rows].tolist():
            tokens, logprobs = values[: len(values) // 2], values[len(values) // 2 :]
            emitted.append(Emitted([int(t) for t in tokens[: int(count)]], logprobs[: int(count)], int(drafted)))
        return emitted


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all captures of a device, since memory passes within a stream alone.

    torch's default is one for all devices, on that of the first capture of all.
    """
    return torch.cuda.Stream(device)


def capture(step: Callable[[], Tensor], pool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`step` as a CUDA graph with temporaries from `pool` (None: one of its own), and where it leaves its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=_capture_stream(torch.cuda.current_device())):
        result = step()
    return graph, result


def _weights(model: Phi) -> list[Tensor]:
    """All tensors of the model: its parameters, and the parts of quantized weights, which are none."""
    values = (value for module in model.modules() for value in vars(module).values())
    parts = (part for value in values if isinstance(value, tuple) for part in value)
    return [*model.parameters(), *(part for part in parts if isinstance(part, Tensor))]


def _addresses(model: Phi) -> list[int]:
    """Where captured graphs look for the weights; oneDNN's layouts, a CPU's, tell no address and are in no graph."""
    return [t.data_ptr() for t in _weights(model) if not t.is_mkldnn]


def working_bytes(model: Phi) -> int:
    """About what a chunk of a prefill, and a step of all rows with every sampling option, take beside the cache."""
    config, device = model.config, model.embed.device.type
    row = (7 * config.channels + 2 * config.mlp_hidden) * model.embed.dtype.itemsize  # a layer's tensors
    return PREFILL_CHUNK.get(device, 0) * row + MAX_ROWS * config.vocab * SAMPLING_BYTES + LIBRARY_BYTES.get(device, 0)


class DecodeBatch:
    """Room for `slots` sequences of up to `positions` tokens each, allocated once. InputError where memory is short.

    Only ids below `valid_ids` are ever drawn.
    """

    @torch.inference_mode(False)  # buffers born in inference mode could not be written outside of it
    def __init__(self, model: Phi, slots: int, positions: int, valid_ids: int):
        self.model, self.slots = model, slots
        self._valid_ids, self._device = valid_ids, model.embed.device
        self._addresses = _addresses(model)
        self._needed = {"weights": sum(t.nbytes for t in _weights(model)), "working": working_bytes(model)}
        self.cache = KVCache.allocate(
            model.config, slots, positions, device=self._device, dtype=model.embed.dtype, **self._needed
        )
        try:
            self._allocate_buffers()
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            raise self.short_of_memory() from None
        self._sent_rows, self._sampling, self._lookup = [], Sampling(), 0
        self._captures = self._device.type in CAPTURES
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def _allocate_buffers(self) -> None:
        slots, config = self.slots, self.model.config

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        self._history = zeros(slots, self.cache.positions)
        self._columns = -(-config.vocab // ALIGNED_COLUMNS) * ALIGNED_COLUMNS
        self._seen = zeros(slots, self._columns, dtype=torch.bool)
        # Of each slot: the tokens it has, the tokens it may have, the tokens of its prompt, the key of its draws.
        self._state = zeros(4, slots)
        self._rows, self._numbers = zeros(MAX_ROWS), zeros(4, dtype=torch.float64)

    def short_of_memory(self) -> InputError:
        """What there is to tell where memory did not suffice beside the cache."""
        cache, free = self.cache, free_bytes(self._device)
        sizes = (self.slots, cache.positions, self._device, cache.k.dtype, free + cache.k.nbytes + cache.v.nbytes)
        return too_little_memory(self.model.config, *sizes, **self._needed)

    def fits(self, slots: int, positions: int) -> bool:
        """Whether it has the room, and the weights are still where captured graphs look for them."""
        enough = slots <= self.slots and positions <= self.cache.positions
        return enough and self._addresses == _addresses(self.model)

    def configure(self, sampling: Sampling, lookup: int) -> None:
        """How tokens are drawn from now on, with `lookup` of them drafted in each step."""
        if (sampling.kind, lookup) != (self._sampling.kind, self._lookup):
            self._graphs.clear()
        self._sampling, self._lookup = sampling, lookup
        self._numbers.copy_(self._sent(sampling.numbers()))

    def prefill(self, slot: int, prompt: Sequence[int], start: int) -> Tensor:
        """Runs `prompt` from position `start` on, a multiple of the chunk, into `slot`; logits [1, V] of its end."""
        chunk, cache = PREFILL_CHUNK[self._device.type], self.cache.rows(slot, slot + 1)
        tokens = self._sent(torch.tensor([prompt]))
        with torch.cuda.device_of(self._rows):
            for at in range(start, len(prompt), chunk):
                logits = self.model.prefill(tokens[:, at : at + chunk], cache, at)
        return logits

    @torch.no_grad()
    def begin(self, slot: int, prompt: Sequence[int], limit: int, sample: int, logits: Tensor) -> Record:
        """Begins a sequence in `slot`, where its prompt is already in the cache, with a token drawn from `logits`.

        `limit` is the length, prompt included, at which it ends; seed, prompt and `sample` are the key of its draws.
        """
        key = draw_key(self._sampling.seed, prompt, sample)
        sent = self._sent(torch.tensor([slot, len(prompt), limit, len(prompt), key, *prompt]))
        rows, prompt = sent[:1], sent[5:]
        with torch.cuda.device_of(rows):
            self._state[:, slot] = sent[1:5]
            self._history[slot, : len(prompt)] = prompt
            if self._sampling.penalizes:
                self._seen[slot] = False
                self._seen[slot].index_fill_(0, prompt, True)
            tokens = prompt[-1:, None]
            nothing = torch.zeros_like(tokens)
            return Record(self._emit(rows, logits, tokens, nothing.bool(), nothing[0]), 1)

    @torch.no_grad()
    def step(self, slots: Sequence[int]) -> Record:
        """The next tokens of the sequences in `slots`: one of each, and as many more as prompt lookup guessed right."""
        n = len(slots)
        most = MAX_ROWS // (1 + self._lookup)  # each sequence is as many rows as it has tokens in the step
        size = next(min(bucket, most) for bucket in ROW_BUCKETS if n <= bucket) if self._captures else n
        rows = [*slots, *[slots[-1]] * (size - n)]
        with torch.cuda.device_of(self._rows):
            if rows != self._sent_rows:
                self._sent_rows = []  # an interruption here must not leave a note of rows that are not there
                self._rows[:size] = self._sent(torch.tensor(rows))
                self._sent_rows = rows
            if size in self._graphs:
                graph, result = self._graphs[size]
                graph.replay()
                return Record(result, n)
            # The first of a size runs as it is: it compiles what the capture must find ready.
            record = Record(self._advance(self._rows[:size]), n)
            if self._captures:
                pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
                self._graphs[size] = capture(lambda: self._advance(self._rows[:size]), pool)
            return record

    def _advance(self, rows: Tensor) -> Tensor:
        """One step of the slots `rows` [n]: device work of fixed shapes, without a look at any value."""
        (lengths, limits), history = self._state[:2, rows, None], self._history[rows]
        last = history.gather(1, lengths - 1)
        tokens, drafted = last, torch.zeros_like(rows)
        offsets = torch.arange(1 + self._lookup, device=self._device)
        repeated = (offsets >= limits - lengths) & (offsets > 0)
        if self._lookup:
            drafts, found = draft(history, lengths[:, 0], self._lookup)
            repeated |= (offsets > 0) & ~found[:, None]
            tokens = torch.where(repeated, last, torch.cat([last, drafts], 1))
            drafted = (~repeated[:, 1:]).sum(1)
        positions = lengths - 1 + offsets * ~repeated
        slots = rows[:, None].expand_as(tokens)
        logits = self.model.decode(tokens.flatten(), self.cache, positions.flatten(), slots.flatten())
        return self._emit(rows, logits, tokens, repeated, drafted)

    def _emit(self, rows: Tensor, logits: Tensor, tokens: Tensor, repeated: Tensor, drafted: Tensor) -> Tensor:
        """Draws what follows each of tokens [n, K], the last of a sequence and its drafts, from logits [n K, V], and
        appends to the sequences `rows` [n] what is certain: what follows a draft counts if the draft was drawn itself.

        Each draw has the key and the step that it would have without drafts. Returns what a Record takes.
        """
        lengths, limits, starts, keys = self._state[:, rows, None]
        (n, K), last = tokens.shape, tokens[:, :1]
        offsets = torch.arange(K, device=self._device)
        logits = logits[:, : self._valid_ids].float()
        logits = F.pad(logits, (0, self._columns - self._valid_ids), value=-math.inf)
        seen = None
        if self._sampling.penalizes:  # drafts are of tokens that were there before
            seen = self._seen[rows, None].expand(n, K, -1).flatten(0, 1)
        processed = process(logits, self._sampling, self._numbers, seen)
        steps = (lengths - starts + offsets).flatten()
        chosen = choose(processed, self._sampling, keys.expand(n, K).flatten(), steps).view(n, K)
        logprobs = logits.log_softmax(-1).view(n, K, -1).gather(2, chosen[:, :, None])[:, :, 0]

        right = (tokens[:, 1:] == chosen[:, :-1]) & ~repeated[:, 1:]
        count = torch.minimum(1 + right.cumprod(1).sum(1, keepdim=True), limits - lengths)
        # What is not certain writes the last token over itself.
        certain = offsets < count
        kept = torch.where(certain, chosen, last)
        self._history[rows[:, None], torch.where(certain, lengths + offsets, lengths - 1)] = kept
        if self._sampling.penalizes:
            self._seen[rows[:, None], kept] = torch.ones_like(certain)
        self._state[0, rows] = (lengths + count)[:, 0]
        return torch.cat([count, drafted[:, None], chosen, logprobs.double()], 1)

    def _sent(self, values: Tensor) -> Tensor:
        """`values` on the device; the host does not wait for them to arrive."""
        return (values.pin_memory() if self._device.type == "cuda" else values).to(self._device, non_blocking=True)

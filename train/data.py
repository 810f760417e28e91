"""Samples: numbered training samples, read ahead. TokenDataset: those of a split of prepared token shards.

A split's documents, each ended by end-of-text, form one stream of tokens. It is cut every `context` tokens; a sample is
one such piece with the same piece one token further as its targets: the only shift by one in the project. Which sample
a number stands for is a pure function. Samples are numbered on through the epochs, so the number of the next one is all
the state that training has to keep: resuming, and any number of ranks, give the same samples. Within an epoch they come
in the order of a Feistel network keyed by (seed, epoch), a bijection computed in constant memory (Luby and Rackoff
1988; walking the cycle until the value is in range: Black and Rogaway 2002).

Documents do not see each other: `segment_ids` counts them within the sample, and the target of an end-of-text, which is
the first token of an unrelated document, is IGNORED.
"""

import functools
import hashlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from xiangxin_fast.errors import InputError

from .shards import SPLITS, Manifest, Shard

IGNORED = -100  # torch's ignore_index: a target without a loss
PREFETCHED = 4  # batches held ready: reading is far faster than a step, only its latency is to be hidden

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


class Samples:
    """Samples numbered from 0 on without end, `len` of them in an epoch.

    NumPy only, so that reading data needs no torch; `torch.from_numpy` takes its arrays as they are.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, index: int) -> Batch:
        """Global sample `index`: tokens int64 [T], targets int64 [T] with IGNORED, segment_ids int32 [T] from 0 up."""
        raise NotImplementedError

    def batch(self, first: int, count: int) -> Batch:
        """Global samples first .. first + count - 1, each array stacked to [count, T]."""
        samples = [self.sample(index) for index in range(first, first + count)]
        tokens, targets, segment_ids = (np.stack(arrays) for arrays in zip(*samples, strict=True))
        return tokens, targets, segment_ids

    def batches(self, first: int, count: int, stop: int, stride: int | None = None) -> Iterator[Batch]:
        """`batch(first, count)`, then one every `stride` samples (default: `count`) until `stop`; a thread reads ahead.

        Rank r of W reads `batches(next + r * count, count, stop, W * count)`. A batch that would pass `stop` is cut.
        """
        ready: queue.Queue = queue.Queue(PREFETCHED)
        abandoned = threading.Event()

        def offer(item) -> bool:
            while not abandoned.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def read_ahead():
            try:
                for start in range(first, stop, stride or count):
                    if not offer(self.batch(start, min(count, stop - start))):
                        return
                offer(None)
            except Exception as error:  # it belongs to whoever consumes the batches
                offer(error)

        reader = threading.Thread(target=read_ahead, name="data", daemon=True)
        reader.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            abandoned.set()
            reader.join()


class TokenDataset(Samples):
    """Samples of `context` tokens of one split ("train" or "validation")."""

    def __init__(self, directory: str | Path, split: str, context: int, seed: int, source: str | None = None):
        """`source`: only what is of it. InputError where the directory is not whole or has no such sample."""
        if split not in SPLITS:
            raise InputError(f"data: expected a split of {', '.join(SPLITS)}, got {split!r}")
        self.manifest = Manifest.load(directory)
        self.context, self.seed = context, seed
        self._shards = [
            Shard(directory, self.manifest, split, number)
            for number, record in enumerate(self.manifest.splits[split].shards)
            if source in (None, record.source)
        ]
        self._ends = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64)
        tokens = sum(shard.tokens for shard in self._shards)
        self._length = (tokens - 1) // context
        if self._length < 1:
            name = f"{directory}#{source}" if source else directory
            raise InputError(f"{name}: expected over {context} tokens in split {split!r}, found {tokens}")

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int) -> Batch:
        epoch, place = divmod(index, self._length)
        start = permuted(place, self._length, round_keys(self.seed, epoch)) * self.context
        stream = self._read(start, start + self.context + 1)
        tokens = stream[:-1]
        ends = tokens == self.manifest.eos_id
        segment_ids = np.cumsum(ends, dtype=np.int32) - ends
        return tokens, np.where(ends, IGNORED, stream[1:]), segment_ids

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the split's stream, int64."""
        parts = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            shard, begin = self._shards[number], int(self._ends[number]) - self._shards[number].tokens
            end = min(stop, int(self._ends[number]))
            parts.append(shard.read(start - begin, end - begin))
            start, number = end, number + 1
        return np.concatenate(parts).astype(np.int64)


ROUNDS = 6  # four make a Luby-Rackoff permutation; short words and a cheap round function call for more


@functools.lru_cache(maxsize=256)
def round_keys(seed: int, what: int | str) -> tuple[int, ...]:
    """What `permuted` draws a permutation by: for each seed, and each epoch or other purpose, another."""
    digest = hashlib.blake2b(f"{seed} {what}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def permuted(place: int, size: int, keys: tuple[int, ...]) -> int:
    """Where a pseudo-random permutation of 0..size-1, drawn by `keys`, takes `place`."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        place = left << half | right
        if place < size:
            return place


def _mixed(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)

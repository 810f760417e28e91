"""An even sample of the corpus to learn a tokenizer from: each document is in it or not by a hash of its text."""

from pathlib import Path

import numpy as np

from .clean import Options, digests_of
from .files import Unit
from .normalize import normalize
from .records import Reader
from .tokens import Shard, read_texts
from .workers import Advance

SAMPLE_BYTES = 32 << 20  # learning takes 30 bytes of memory for each


def sample_blocks(advance: Advance, shard: Shard, clean: Path, work: Path, rate: float) -> list[str]:
    """The texts of a shard to be that are in a sample of `rate`."""
    verdicts = np.load(work / "verdicts.npy", mmap_mode="r", allow_pickle=False)
    chosen = []
    for texts in read_texts(clean, shard.blocks, shard.split, verdicts):
        chosen += [text.decode() for text in _sampled(texts, rate)]
        advance(sum(map(len, texts)))
    return chosen


Placed = tuple[float, str]  # a text and its place in 0 .. 1, by its hash


def sample_unit(advance: Advance, unit: Unit, options: Options, rate: float) -> tuple[list[Placed], list[Placed]]:
    """Texts of a unit of raw input that are in a sample of `rate`: those to learn from, and those held out."""
    parts: tuple[list[Placed], list[Placed]] = ([], [])
    reader, shown = Reader(unit, options.text_key, options.titles), 0
    for record in reader:
        if record.text is None:
            continue
        text = normalize(record.text) if options.normalize else record.text
        digest = digests_of([text.encode()])[0]
        if text and (place := digest[2] / 2**64) < rate:
            parts[int(digest[1] / 2**64 < options.holdout)].append((place, text))
        if reader.position - shown >= 1 << 20:
            advance(reader.position - shown)
            shown = reader.position
    advance(unit.bytes - shown)
    return parts


def thinned(sample: list[Placed], limit: int) -> list[str]:
    """At most `limit` bytes of a sample: it has more where files are compressed, whose texts' size nobody knows yet."""
    sizes = np.array([len(text.encode()) for _, text in sample], np.int64)
    order = np.argsort([place for place, _ in sample], kind="stable")
    chosen = np.sort(order[np.cumsum(sizes[order]) <= limit])
    return [sample[number][1] for number in chosen]


def _sampled(texts: list[bytes], rate: float) -> list[bytes]:
    if rate >= 1 or not texts:
        return texts
    places = digests_of(texts)[:, 2] / 2**64
    return [texts[index] for index in np.flatnonzero(places < rate)]

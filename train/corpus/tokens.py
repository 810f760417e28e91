"""From clean documents to token shards: which documents go into which shard, and one shard at a time."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from train.shards import SPLITS, ShardRecord, ShardWriter
from xiangxin_fast.strict_files import parse_json, write_json
from xiangxin_fast.tokenizer import Tokenizer

from .clean import read_block
from .duplicates import KEPT
from .workers import Advance

MIN_SHARD_BYTES, MAX_SHARD_BYTES = 4 << 20, 64 << 20  # of text; a token is a byte or more, so SHARD_TOKENS is kept
WANTED_SHARDS = 64


@dataclass(frozen=True)
class Block:
    """Some documents of a segment, compressed together: the first is its document `first`, the corpus's `number`."""

    stem: str
    offset: int
    first: int
    number: int
    documents: int


@dataclass(frozen=True)
class Shard:
    """One shard to write: all of `split`'s documents in its blocks that are no duplicates."""

    split: str
    number: int
    source: str
    blocks: tuple[Block, ...]
    text_bytes: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def documents_of(directory: Path, stem: str) -> np.ndarray:
    return np.load(directory / f"{stem}.documents.npy", mmap_mode="r", allow_pickle=False)


def plan_shards(segments: list[dict], directory: Path, verdicts: np.ndarray) -> list[Shard]:
    """Cuts the kept documents of each source and split, in order, into shards; blocks are never cut.

    `segments`: source, stem, blocks and first document of each segment, in order.
    """
    sizes: dict[tuple[str, str], list[tuple[Block, int]]] = {}
    for segment in segments:
        documents = documents_of(directory, segment["stem"])
        first, stem = segment["first"], segment["stem"]
        kept = verdicts[first : first + len(documents)] == KEPT
        starts = np.cumsum([0, *(count for _, count in segment["blocks"])])[:-1]
        for split, name in enumerate(SPLITS):
            chosen = np.where(kept & (documents["split"] == split), documents["bytes"] + np.int64(1), 0)
            blocks = sizes.setdefault((segment["source"], name), [])
            totals = np.add.reduceat(chosen, starts).tolist()
            for (offset, count), start, total in zip(segment["blocks"], starts.tolist(), totals, strict=True):
                if total:
                    blocks.append((Block(stem, offset, start, first + start, count), total))
    limit = sum(total for blocks in sizes.values() for _, total in blocks) // WANTED_SHARDS
    limit = min(max(limit, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
    shards: list[Shard] = []
    numbers = dict.fromkeys(SPLITS, 0)
    for (source, split), blocks in sizes.items():
        for group in _grouped(blocks, limit):
            total = sum(size for _, size in group)
            shards.append(Shard(split, numbers[split], source, tuple(block for block, _ in group), total))
            numbers[split] += 1
    return shards


def _grouped(blocks: list[tuple[Block, int]], limit: int) -> Iterator[list[tuple[Block, int]]]:
    group, filled = [], 0
    for block, size in blocks:
        if group and filled + size > limit:
            yield group
            group, filled = [], 0
        group.append((block, size))
        filled += size
    if group:
        yield group


def read_texts(directory: Path, blocks: Iterable[Block], split: str, verdicts: np.ndarray) -> Iterator[list[bytes]]:
    """The split's kept texts, block by block."""
    for stem, inside in itertools.groupby(blocks, lambda block: block.stem):
        documents = documents_of(directory, stem)
        with (directory / f"{stem}.text").open("rb") as stream:
            for block in inside:
                records = documents[block.first : block.first + block.documents]
                kept = verdicts[block.number : block.number + block.documents] == KEPT
                kept &= records["split"] == SPLITS.index(split)
                texts = read_block(stream, block.offset, records)
                yield [texts[index] for index in np.flatnonzero(kept)]


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: str) -> Tokenizer:
    return Tokenizer.load(directory)


def shard_result(work: Path, out: Path, shard: Shard) -> dict | None:
    """What `write_shard` left, or None where the shard is to be written."""
    result, file = work / f"{shard.name}.json", out / f"{shard.name}.bin"
    if not result.exists() or not file.exists():
        return None
    content = parse_json(result.read_bytes(), str(result))
    return content if file.stat().st_size == content["record"]["bytes"] else None


def write_shard(advance: Advance, shard: Shard, clean: Path, work: Path, out: Path, tokenizer_dir: str) -> None:
    """Encodes one shard's documents into `out` and leaves its line of the manifest in `work`."""
    tokenizer = _tokenizer(tokenizer_dir)
    verdicts = np.load(work / "verdicts.npy", mmap_mode="r", allow_pickle=False)
    writer = ShardWriter(
        out, shard.split, len(tokenizer), tokenizer.eos_id, tokenizer.sha256, source=shard.source, first=shard.number
    )
    text_bytes = characters = 0
    with ThreadPoolExecutor(1) as background:  # encoding lets go of the GIL: the next block is encoded meanwhile
        ahead = None
        blocks = read_texts(clean, shard.blocks, shard.split, verdicts)
        for texts in itertools.chain(blocks, [None]):
            current, ahead = ahead, texts and (texts, background.submit(_encode, tokenizer, texts))
            if current:
                contents, encoding = current
                count, tokens = encoding.result()
                writer.add(*tokens)
                size = sum(map(len, contents))
                text_bytes += size
                characters += count
                advance(size)
    (record,) = writer.close()
    result = {"record": asdict(record), "text_bytes": text_bytes, "characters": characters}
    write_json(work / f"{shard.name}.json", result)


def _encode(tokenizer: Tokenizer, contents: list[bytes]) -> tuple[int, list[list[int]]]:
    texts = [content.decode() for content in contents]
    return sum(map(len, texts)), tokenizer.encode_batch(texts)


def record_of(result: dict) -> ShardRecord:
    return ShardRecord(**result["record"])

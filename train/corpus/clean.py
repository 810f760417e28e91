"""One unit of input to clean documents: read, normalise, filter, decontaminate, and take signatures of the rest.

What a unit gives depends on the unit and the options alone. Beside each other, under its number, it leaves

    000017.json              what happened, and its segments; it appears last
    000017.rejects.jsonl     a line for each record that has no usable text; lines are counted from the unit's first
    000017.benchmarks.jsonl  a line for each document left out for a benchmark's item
    000017-0000.text         a segment's texts: zstd frames of whole documents, one for each batch
    000017-0000.documents.npy, .hashes.npy, .places.npy
"""

import functools
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zstandard

from xiangxin_fast.strict_files import parse_json, sync, write_json

from . import filters
from .benchmarks import Benchmarks
from .duplicates import minhash, save_signatures, signatures
from .files import Unit
from .fold import fold
from .normalize import normalize
from .records import Reader
from .workers import Advance

BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 1 << 12
SEGMENT_BYTES = 64 << 20
SEGMENT_DOCUMENTS = 1 << 17
EXAMPLES = 3
EXAMPLE_CHARACTERS = 80
SPLITS = ("train", "validation")
DOCUMENT = np.dtype([("bytes", "<u4"), ("characters", "<u4"), ("split", "u1")])


@dataclass(frozen=True)
class Options:
    """What happens to each record. `holdout` is the fraction of documents that becomes the validation split."""

    text_key: str | None = None
    titles: bool = True
    normalize: bool = True
    filter: bool = True
    exact: bool = True
    near: bool = True
    benchmarks: tuple[str, ...] = ()
    holdout: float = 0.005


@dataclass
class Ledger:
    """What came of records or documents, by reason: how many, how many bytes of text, and the first few."""

    counts: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    examples: dict[str, list] = field(default_factory=dict)

    def add(self, reason: str, size: int, example: dict) -> None:
        self.counts[reason] += 1
        self.bytes[reason] += size
        if self.counts[reason] <= EXAMPLES:
            self.examples.setdefault(reason, []).append(example)

    def merge(self, other: "Ledger") -> None:
        self.counts.update(other.counts)
        self.bytes.update(other.bytes)
        for reason, examples in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += examples[: EXAMPLES - len(mine)]

    def to_json(self) -> dict:
        return {
            reason: {"documents": count, "bytes": self.bytes[reason], "examples": self.examples.get(reason, [])}
            for reason, count in sorted(self.counts.items())
        }

    @staticmethod
    def from_json(content: dict) -> "Ledger":
        ledger = Ledger()
        for reason, entry in content.items():
            ledger.counts[reason], ledger.bytes[reason] = entry["documents"], entry["bytes"]
            ledger.examples[reason] = entry["examples"]
        return ledger


@functools.lru_cache(maxsize=1)
def load_benchmarks(paths: tuple[str, ...]) -> Benchmarks | None:
    """The index of the files at `paths`, once in each process."""
    return Benchmarks([Path(path) for path in paths]) if paths else None


def read_unit_result(directory: Path, number: int) -> dict | None:
    """The JSON a unit left, or None where it is to be done: it or a file of its segments is missing or cut."""
    file = directory / f"{number:06d}.json"
    if not file.exists():
        return None
    content = parse_json(file.read_bytes(), str(file))
    for segment in content["segments"]:
        for name, size in segment["files"].items():
            path = directory / name
            if not path.exists() or path.stat().st_size != size:
                return None
    return content


def clean_unit(advance: Advance, unit: Unit, options: Options, directory: Path) -> None:
    """Carries out all stages up to the signatures and leaves the unit's files in `directory`."""
    stem = f"{unit.number:06d}"
    rejected, dropped = Ledger(), {stage: Ledger() for stage in ("normalize", "filter", "decontaminate")}
    benchmarks = load_benchmarks(options.benchmarks)
    reader = Reader(unit, options.text_key, options.titles)
    segments = _Segments(directory, stem)
    records = shown = 0
    with (
        (directory / f"{stem}.rejects.jsonl").open("w", encoding="utf-8") as rejects,
        (directory / f"{stem}.benchmarks.jsonl").open("w", encoding="utf-8") as found,
    ):
        for batch in _batches(reader):
            records += len(batch)
            texts, places = [], []
            for record in batch:
                place = {"file": unit.file.path, "offset": record.offset}
                if record.text is None:
                    rejected.add(record.reason, 0, place)
                    line = {} if record.line is None else {"line": record.line}
                    _write_line(rejects, {"source": unit.file.source, **place, **line, "reason": record.reason})
                    continue
                text = normalize(record.text) if options.normalize else record.text
                if text:
                    texts.append(text)
                    places.append(place)
                else:
                    dropped["normalize"].add("nothing visible", len(record.text.encode()), place)
            verdicts = judge(texts, options, benchmarks) if texts else []
            kept = [index for index, (stage, _) in enumerate(verdicts) if stage is None]
            for text, place, (stage, reason) in zip(texts, places, verdicts, strict=True):
                if stage is not None:
                    size = len(text.encode())
                    start = text[:EXAMPLE_CHARACTERS]
                    if stage == "decontaminate":
                        item = benchmarks.items[reason]
                        _write_line(found, {"source": unit.file.source, **place, "item": item, "start": start})
                        dropped[stage].add(item.split(": ")[0], size, place | {"item": item, "start": start})
                    else:
                        dropped[stage].add(reason, size, place | {"start": start})
            if kept:
                segments.add([texts[index] for index in kept], unit.file.split, options)
            advance(max(0, reader.position - shown))
            shown = max(shown, reader.position)
    advance(unit.bytes - shown)
    segments.close()
    for kind in ("rejects", "benchmarks"):
        sync(directory / f"{stem}.{kind}.jsonl")
    result = {
        "file": unit.file.path,
        "source": unit.file.source,
        "records": records,
        "lines": reader.lines,
        "rejected": rejected.to_json(),
        "dropped": {stage: ledger.to_json() for stage, ledger in dropped.items()},
        "segments": segments.done,
    }
    write_json(directory / f"{stem}.json", result)


Verdict = tuple[str | None, str | int | None]


def judge(texts: list[str], options: Options, benchmarks: Benchmarks | None) -> list[Verdict]:
    """The stage that leaves each text out and its reason, (None, None) where it stays; a benchmark's item by number."""
    verdicts: list[Verdict] = [(None, None)] * len(texts)
    if not options.filter and benchmarks is None:
        return verdicts
    folded = fold(texts)
    if benchmarks is not None:
        for index, item in benchmarks.find(folded).items():
            verdicts[index] = ("decontaminate", item)
    if options.filter:
        for index, reason in enumerate(filters.judge(texts, folded)):
            if reason is not None:
                verdicts[index] = ("filter", reason)
    return verdicts


def _write_line(stream, content: dict) -> None:
    stream.write(json.dumps(content, ensure_ascii=False) + "\n")


def _batches(reader: Reader):
    """Records in lists of about BATCH_CHARACTERS; the last one may be empty."""
    batch, characters = [], 0
    for record in reader:
        batch.append(record)
        characters += len(record.text or "")
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    yield batch


class _Segments:
    """Writes the documents of one unit, in files of bounded size so that no step ever holds more than one."""

    def __init__(self, directory: Path, stem: str):
        self.done: list[dict] = []
        self._directory, self._stem, self._stream = directory, stem, None

    def add(self, texts: list[str], split: str | None, options: Options) -> None:
        """Appends a batch of documents. `split`: of all of them, or None to tell by their hashes."""
        if self._stream is None:
            self._begin()
        contents = [text.encode() for text in texts]
        digests = digests_of(contents)
        documents = np.empty(len(texts), DOCUMENT)
        documents["bytes"] = [len(content) for content in contents]
        documents["characters"] = [len(text) for text in texts]
        held_out = digests[:, 1] < np.uint64(min(int(options.holdout * 2**64), 2**64 - 1))
        documents["split"] = held_out if split is None else SPLITS.index(split)
        self._documents.append(documents)
        if options.exact or options.near:
            self._columns.append(signatures(digests[:, 0], minhash(fold(texts)) if options.near else None))
        self._blocks.append((self._stream.tell(), len(texts)))
        self._stream.write(zstandard.ZstdCompressor(level=1).compress(b"".join(contents)))
        self._bytes += int(documents["bytes"].sum(dtype=np.int64))
        self._count += len(texts)
        if self._bytes >= SEGMENT_BYTES or self._count >= SEGMENT_DOCUMENTS:
            self.close()

    def _begin(self) -> None:
        self._name = f"{self._stem}-{len(self.done):04d}"
        self._stream = (self._directory / f"{self._name}.text").open("wb")
        self._documents, self._columns, self._blocks = [], [], []
        self._bytes = self._count = 0

    def close(self) -> None:
        """Completes the segment at hand, if there is one."""
        if self._stream is None:
            return
        self._stream.close()
        self._stream = None
        names = [f"{self._name}.text", f"{self._name}.documents.npy"]
        np.save(self._directory / names[1], np.concatenate(self._documents), allow_pickle=False)
        if self._columns:
            names += [f"{self._name}.hashes.npy", f"{self._name}.places.npy"]
            save_signatures(np.concatenate(self._columns, 1), *(self._directory / name for name in names[2:]))
        for name in names:
            sync(self._directory / name)
        sizes = {name: (self._directory / name).stat().st_size for name in names}
        self.done.append({"documents": self._count, "blocks": self._blocks, "files": sizes})


def digests_of(contents: list[bytes]) -> np.ndarray:
    """Three independent hashes of each text, uint64 [documents, 3]: its identity, its split, its place in samples."""
    digests = b"".join(hashlib.blake2b(content, digest_size=24).digest() for content in contents)
    return np.frombuffer(digests, "<u8").reshape(-1, 3)


def read_block(stream, offset: int, documents: np.ndarray) -> list[bytes]:
    """The texts of one frame of a .text file, whose documents' records (DOCUMENT) are given."""
    stream.seek(offset)
    content = (
        zstandard.ZstdDecompressor()
        .decompressobj()
        .decompress(stream.read(int(documents["bytes"].sum(dtype=np.int64)) + 1024))
    )
    ends = np.cumsum(documents["bytes"], dtype=np.int64)
    return [content[end - size : end] for end, size in zip(ends.tolist(), documents["bytes"].tolist(), strict=True)]

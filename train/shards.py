"""Token shards: the files between `prepare.py`, which writes them, and `data.py`, which reads them.

A data directory holds `manifest.json`, the tokenizer's `tokenizer.json`, and per split (`train`, `validation`) the
shards `<split>-00000.bin`, `<split>-00001.bin`, ... A shard is, little-endian:

    header    4,096 bytes: HEADER, then zeros (so that the tokens start on a page)
    tokens    uint16, or uint32 for more than 65,536 tokens; each document ends in end-of-text; zeros up to 8 bytes
    documents uint64 each: where the document starts, in tokens from the shard's first
    table     uint32 each: crc32 of every 64 KiB block of tokens and documents

Nothing is used unchecked, and nothing is read twice for it: the manifest holds the sha256 of each header, the header
that of the table, and a block is held against the table when it is first touched. So a flipped bit, a cut or grown
file, a shard of another run, place or tokenizer is an InputError that names the file (and the block) before any of its
tokens is used. The manifest also has the sha256 of each whole file, for `prepare.py verify`. No document lies in two
shards, and no shard holds documents of two sources: the manifest names the source of each shard, and of each source the
weight it was given.
"""

import hashlib
import itertools
import os
import re
import struct
import sys
import zlib
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from xiangxin_fast.errors import InputError
from xiangxin_fast.strict_files import read_json, sync, write_json

FORMAT = "xiangxin-fast token shards"
MAGIC, VERSION = b"XXTOKENS", 1
# magic | version, bytes per token, vocab, eos id, shard number, block bytes | tokens, documents | sha256 of the
# tokenizer, of the table | split
HEADER = struct.Struct("<8s6I2Q32s32s16s")
HEADER_BYTES = 4096
BLOCK_BYTES = 64 << 10
SHARD_TOKENS = 64 << 20
SHARD_DOCUMENTS = 4 << 20
SPLITS = ("train", "validation")
SOURCE = "corpus"  # the name where no other is given
MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class ShardRecord:
    """One shard's line in the manifest."""

    name: str
    tokens: int
    documents: int
    bytes: int
    header_sha256: str
    sha256: str
    source: str


@dataclass(frozen=True)
class SourceRecord:
    """The weight a source was given (how often to draw its tokens, relative to their number) and its text by split."""

    weight: float
    text_bytes: dict[str, int]
    characters: dict[str, int]


@dataclass(frozen=True)
class Split:
    """One split: its shards, and the size of the text they were made from."""

    shards: list[ShardRecord]
    text_bytes: int
    characters: int

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """What a data directory holds. `vocab` is how many tokens the tokenizer has, `rejects` counts by reason."""

    vocab: int
    eos_id: int
    tokenizer_sha256: str
    splits: dict[str, Split]
    rejects: dict[str, int]
    sources: dict[str, SourceRecord] = field(default_factory=lambda: {SOURCE: SourceRecord(1.0, {}, {})})

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab <= 1 << 16 else "<u4")

    def save(self, directory: Path) -> None:
        """Writes manifest.json; the directory counts as prepared from then on."""
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        write_json(Path(directory) / "manifest.json", content)
        sync(Path(directory))

    @staticmethod
    def load(directory: str | Path) -> "Manifest":
        """Reads and checks manifest.json and that tokenizer.json is the one the shards were made with."""
        file = Path(directory) / "manifest.json"
        if not file.is_file():
            raise InputError(f"{directory}: expected a directory that train/prepare.py made, found no manifest.json")
        content = read_json(file, MAX_MANIFEST_BYTES)
        try:
            if (found := (content["format"], content["version"])) != (FORMAT, VERSION):
                raise ValueError(f"expected {(FORMAT, VERSION)}, got {found}")
            manifest = Manifest(
                _whole(content["vocab"]),
                _whole(content["eos_id"]),
                _sha256(content["tokenizer_sha256"]),
                {split: _split(content["splits"][split], split) for split in SPLITS},
                {str(reason): _whole(count) for reason, count in content["rejects"].items()},
                {str(name): _source(source) for name, source in content["sources"].items()},
            )
            for split in manifest.splits.values():
                for shard in split.shards:
                    if shard.source not in manifest.sources:
                        raise ValueError(f"expected {shard.name} to be of a source listed, got {shard.source!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{file}: not a valid manifest: {' '.join(reason.split())[:200]}") from None
        tokenizer = Path(directory) / "tokenizer.json"
        found = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else "no such file"
        if found != manifest.tokenizer_sha256:
            raise InputError(f"{tokenizer}: expected sha256 {manifest.tokenizer_sha256}, got {found}")
        return manifest


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def _sha256(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"expected a sha256, got {value!r}")
    return value


def _source(content: dict) -> SourceRecord:
    weight = content["weight"]
    if type(weight) not in (int, float) or not 0 < weight <= sys.float_info.max:
        raise ValueError(f"expected a weight over 0, got {weight!r}")
    sizes = ({str(k): _whole(v) for k, v in content[name].items()} for name in ("text_bytes", "characters"))
    return SourceRecord(weight, *sizes)


def _split(content: dict, split: str) -> Split:
    shards = [_record(shard, f"{split}-{number:05d}.bin") for number, shard in enumerate(content["shards"])]
    return Split(shards, _whole(content["text_bytes"]), _whole(content["characters"]))


def _record(content: dict, name: str) -> ShardRecord:
    if content["name"] != name:
        raise ValueError(f"expected shard {name}, got {content['name']!r}")
    sizes = (_whole(content[field]) for field in ("tokens", "documents", "bytes"))
    return ShardRecord(
        name, *sizes, _sha256(content["header_sha256"]), _sha256(content["sha256"]), str(content["source"])
    )


class ShardWriter:
    """Writes one source's documents into shards of at most `shard_tokens` tokens; a longer document gets its own.

    The shards are numbered from `first` on. A file has its name from the moment it is whole.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        vocab: int,
        eos_id: int,
        tokenizer_sha256: str,
        shard_tokens: int = SHARD_TOKENS,
        source: str = SOURCE,
        first: int = 0,
    ):
        self.directory, self.split, self.shard_tokens = directory, split, shard_tokens
        self.vocab, self.eos_id, self.tokenizer_sha256 = vocab, eos_id, bytes.fromhex(tokenizer_sha256)
        self.source, self.first = source, first
        self.dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
        self.records: list[ShardRecord] = []
        self._stream = None

    def add(self, *documents: list[int]) -> None:
        """Appends documents, each with the end-of-text that it does not have yet."""
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) + 1
        ends = np.cumsum(lengths)
        ids = np.empty(ends[-1], np.int64)
        inside = np.ones(ends[-1], bool)
        inside[ends - 1] = False
        ids[inside] = np.fromiter(itertools.chain.from_iterable(documents), np.int64, ends[-1] - len(documents))
        ids[ends - 1] = self.eos_id
        if ids.min() < 0 or ids.max() >= self.vocab:
            raise ValueError(f"ShardWriter.add: expected tokens in 0..{self.vocab - 1}, got {ids.min()}..{ids.max()}")
        ids = ids.astype(self.dtype)
        starts = ends - lengths
        done = 0
        while done < len(documents):
            if not self._stream:
                self._begin_shard()
            room = int(np.searchsorted(ends, starts[done] + self.shard_tokens - self._tokens, side="right")) - done
            room = min(room, SHARD_DOCUMENTS - len(self._starts))
            if room <= 0 and self._tokens:
                self._finish_shard()
                continue
            stop = done + max(room, 1)
            self._starts.extend((starts[done:stop] - starts[done] + self._tokens).tolist())
            self._tokens += int(ends[stop - 1] - starts[done])
            self._write(ids[starts[done] : ends[stop - 1]].tobytes())
            done = stop

    def close(self) -> list[ShardRecord]:
        """Completes the last shard and returns all of them, for the manifest."""
        if self._stream:
            self._finish_shard()
        return self.records

    def _begin_shard(self) -> None:
        self._number = self.first + len(self.records)
        self._name = f"{self.split}-{self._number:05d}.bin"
        self._partial = self.directory / f"{self._name}.partial"
        self._stream = self._partial.open("wb+")
        self._stream.write(bytes(HEADER_BYTES))
        self._tokens, self._starts, self._checksums, self._pending = 0, array("Q"), array("I"), bytearray()

    def _write(self, content: bytes) -> None:
        self._pending += content
        whole = len(self._pending) // BLOCK_BYTES * BLOCK_BYTES
        if whole:
            self._flush(whole)

    def _flush(self, size: int) -> None:
        content = bytes(self._pending[:size])
        del self._pending[:size]
        self._checksums.extend(zlib.crc32(content[i : i + BLOCK_BYTES]) for i in range(0, size, BLOCK_BYTES))
        self._stream.write(content)

    def _finish_shard(self) -> None:
        self._write(bytes(-self._tokens * self.dtype.itemsize % 8))
        self._write(np.asarray(self._starts, "<u8").tobytes())
        self._flush(len(self._pending))
        table = np.asarray(self._checksums, "<u4").tobytes()
        header = HEADER.pack(
            MAGIC,
            VERSION,
            self.dtype.itemsize,
            self.vocab,
            self.eos_id,
            self._number,
            BLOCK_BYTES,
            self._tokens,
            len(self._starts),
            self.tokenizer_sha256,
            hashlib.sha256(table).digest(),
            self.split.encode(),
        ).ljust(HEADER_BYTES, b"\0")
        with self._stream as stream:
            stream.write(table)
            stream.seek(0)
            stream.write(header)
            stream.flush()
            os.fsync(stream.fileno())
            stream.seek(0)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.seek(0, os.SEEK_END)
        os.replace(self._partial, self.directory / self._name)
        sync(self.directory)
        header_sha256 = hashlib.sha256(header).hexdigest()
        self.records.append(
            ShardRecord(self._name, self._tokens, len(self._starts), size, header_sha256, sha256, self.source)
        )
        self._stream = None


class Shard:
    """One shard, memory-mapped; blocks are checked when first touched. Cutting a mapped file kills its readers."""

    def __init__(self, directory: str | Path, manifest: Manifest, split: str, number: int):
        record = manifest.splits[split].shards[number]
        self.file, self._sha256 = Path(directory) / record.name, record.sha256
        self.vocab, self.eos_id, self.dtype = manifest.vocab, manifest.eos_id, manifest.dtype
        try:
            size = self.file.stat().st_size
            header = np.fromfile(self.file, np.uint8, HEADER_BYTES).tobytes()
        except OSError as error:
            raise InputError(f"{self.file}: cannot be read: {error.strerror}") from None
        if size < HEADER_BYTES or header[: len(MAGIC)] != MAGIC:
            raise InputError(f"{self.file}: expected a token shard, found {size:,} bytes without its magic")
        fields = HEADER.unpack_from(header)
        expected = {
            "version": VERSION,
            "bytes per token": self.dtype.itemsize,
            "vocab": manifest.vocab,
            "eos id": manifest.eos_id,
            "shard number": number,
            "block bytes": BLOCK_BYTES,
            "tokens": record.tokens,
            "documents": record.documents,
            "tokenizer": bytes.fromhex(manifest.tokenizer_sha256),
        }
        for (name, wanted), found in zip(expected.items(), fields[1:], strict=False):
            if wanted != found:
                wanted, found = (value.hex() if isinstance(value, bytes) else value for value in (wanted, found))
                raise InputError(f"{self.file}: expected {name} {wanted} as in manifest.json, got {found}")
        if hashlib.sha256(header).hexdigest() != record.header_sha256:
            raise InputError(f"{self.file}: the header is corrupt or another run's: its sha256 is not manifest.json's")

        self.tokens, self.documents = record.tokens, record.documents
        self._starts_at = -(-self.tokens * self.dtype.itemsize // 8) * 8
        self._payload_bytes = self._starts_at + 8 * self.documents
        blocks = -(-self._payload_bytes // BLOCK_BYTES)
        if size != (wanted := HEADER_BYTES + self._payload_bytes + 4 * blocks):
            raise InputError(f"{self.file}: expected {wanted:,} bytes, got {size:,}: it is cut or has grown")
        self._bytes = np.memmap(self.file, np.uint8, "r")
        table = self._bytes[HEADER_BYTES + self._payload_bytes :]
        if hashlib.sha256(table).digest() != fields[10]:
            raise InputError(f"{self.file}: the checksum table is corrupt")
        self._checksums = np.frombuffer(table.tobytes(), "<u4")
        self._checked = np.zeros(blocks, bool)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1, in the file's dtype: a view that lives as long as the shard."""
        if not 0 <= start <= stop <= self.tokens:
            raise ValueError(f"Shard.read: expected 0 <= start <= stop <= {self.tokens}, got {start}..{stop}")
        size = self.dtype.itemsize
        return self._payload(start * size, stop * size).view(self.dtype)

    def starts(self) -> np.ndarray:
        """Where each document starts: uint64 [documents], ascending from 0."""
        return self._payload(self._starts_at, self._payload_bytes).view("<u8")

    def check(self) -> None:
        """Reads the whole file: its sha256, every block, and the document index beside the end-of-text tokens."""
        with self.file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        ends = np.flatnonzero(self.read(0, self.tokens) == self.eos_id) + 1
        if not np.array_equal(self.starts(), np.append(0, ends[:-1])) or ends[-1] != self.tokens:
            raise InputError(f"{self.file}: the document index does not fit the end-of-text tokens")
        if found != self._sha256:
            raise InputError(f"{self.file}: expected sha256 {self._sha256}, got {found}")

    def _payload(self, start: int, stop: int) -> np.ndarray:
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            if not self._checked[block]:
                self._check_block(block)
        return self._bytes[HEADER_BYTES + start : HEADER_BYTES + stop]

    def _check_block(self, block: int) -> None:
        start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self._payload_bytes)
        content = self._bytes[HEADER_BYTES + start : HEADER_BYTES + stop]
        if zlib.crc32(content) != self._checksums[block]:
            raise InputError(f"{self.file}: block {block} (bytes {HEADER_BYTES + start:,} onwards) is corrupt")
        tokens = content[: max(0, self.tokens * self.dtype.itemsize - start)].view(self.dtype)
        if len(tokens) and tokens.max() >= self.vocab:
            raise InputError(f"{self.file}: block {block} has token {tokens.max()}, expected at most {self.vocab - 1}")
        self._checked[block] = True

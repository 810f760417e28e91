"""Where the text is: sources, their files, how these are opened, and the units of work they are cut into.

A file is .txt, .jsonl, .json or .parquet, plain or (but for parquet) in .gz or .zst; what it holds is told by its first
bytes, not by its name. Its encoding is decided once, on its first bytes that are not ASCII: UTF-8 unless more than half
of them are invalid in it, else GB18030 by the same rule, else the file is rejected. Decoding is strict either way.

A unit is what one process reads in one go: a range of bytes of a plain line file, row groups of a parquet file, or a
whole file of another kind. Units depend on the inputs alone, never on the number of processes.
"""

import codecs
import glob
import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from xiangxin_fast.errors import InputError

KINDS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = ("", ".gz", ".zst")
GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
BOM_GB18030 = "\ufeff".encode("gb18030")
PROBE_BYTES = 1 << 20
ENOUGH_BYTES = 1024  # not ASCII, to tell an encoding by
MAX_PROBES = 64
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 1 << 20, 32 << 20
WANTED_UNITS = 256


class Broken(Exception):
    """What is wrong with a file from here on: it is cut off or damaged."""


@dataclass(frozen=True)
class Source:
    """Files under one name. `weight`: how often training should draw its tokens, relative to their number."""

    name: str
    weight: float
    paths: tuple[str, ...]
    split: str | None = None  # all of it is this split's, whatever the hash says


@dataclass(frozen=True)
class File:
    """One input. `modified` is in nanoseconds; `layout` is lines, array, text, parquet or the reason to reject it."""

    source: str
    split: str | None
    path: str
    bytes: int
    modified: int
    compression: str
    layout: str
    encoding: str


@dataclass(frozen=True)
class Unit:
    """Bytes start .. stop of a file, or its row groups where it is parquet; stop None is the end.

    `bytes` of the file, compressed where it is, stand for the unit in progress bars and in the rates of samples.
    """

    number: int
    file: File
    start: int
    stop: int | None
    bytes: int


def parse_source(argument: str) -> Source:
    """`PATH` is of the source "corpus" with weight 1; `NAME=PATH` or `NAME:WEIGHT=PATH` says otherwise."""
    match = re.fullmatch(r"([\w.-]+)(?::([^=/]+))?=(.+)", argument, re.DOTALL)
    if match is None or Path(argument).exists():
        return Source("corpus", 1.0, (argument,))
    try:
        weight = float(match[2] or 1)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise InputError(f"{argument}: expected NAME:WEIGHT=PATH with a weight over 0, got {match[2]!r}")
    return Source(match[1], weight, (match[3],))


def merge_sources(sources: list[Source]) -> list[Source]:
    """One source for each name, in the order of first mention. Raises InputError where a name has two weights."""
    merged: dict[str, Source] = {}
    for source in sources:
        known = merged.setdefault(source.name, Source(source.name, source.weight, (), source.split))
        if (known.weight, known.split) != (source.weight, source.split):
            raise InputError(f"source {source.name}: expected one weight, got {known.weight:g} and {source.weight:g}")
        merged[source.name] = Source(known.name, known.weight, known.paths + source.paths, known.split)
    return list(merged.values())


def list_files(sources: list[Source], tell: Callable[[str], None] = print) -> list[File]:
    """Every file of every source, each once, in a fixed order. InputError for an input that is missing or no text.

    `tell` is given a line for each directory with files whose names say that they are none.
    """
    files: dict[str, File] = {}
    for source in sources:
        for path in source.paths:
            for found in _expand(path, tell):
                if str(found) not in files:
                    files[str(found)] = probe(found, source)
    return list(files.values())


def _suffixed(path: Path) -> bool:
    name = path.name.lower()
    return any(name.endswith(kind + compression) for kind in KINDS for compression in COMPRESSIONS)


def _expand(path: str, tell: Callable[[str], None]) -> list[Path]:
    names = [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
    if not names:
        raise InputError(f"{path}: no such file or directory")
    found: list[Path] = []
    for name in map(Path, names):
        everything = sorted(file for file in name.rglob("*") if file.is_file())
        inside = [file for file in everything if _suffixed(file)]
        if others := len(everything) - len(inside):
            tell(f"{name}: {others:,} files are left out, whose names do not end in {', '.join(KINDS)} (.gz, .zst)")
        if name.is_dir() and not inside and len(names) == 1:
            raise InputError(f"{path}: expected {', '.join(KINDS)} files in this directory, found none")
        if not name.is_dir() and not _suffixed(name):
            raise InputError(f"{name}: expected a directory or a file that ends in {', '.join(KINDS)} (.gz, .zst)")
        found += inside if name.is_dir() else [name]
    return found


def probe(path: Path, source: Source) -> File:
    """What `path` is, from its first bytes. A file that cannot be read says so in its layout."""
    compression, layout, encoding, size, modified = "", "", "utf-8", 0, 0
    try:
        status = path.stat()
        size, modified = status.st_size, status.st_mtime_ns
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic == PARQUET:
            layout = "parquet"
        else:
            compression = "gzip" if magic[:2] == GZIP else "zstd" if magic == ZSTD else ""
            with open_stream(path, compression) as stream:
                head = _read(stream, PROBE_BYTES)
                if head[:2] in UTF16:
                    layout = "reject: UTF-16, neither UTF-8 nor GB18030"
                else:
                    encoding = _encoding_of(head, stream)
                    layout = _layout_of(path, head) if encoding else "reject: neither UTF-8 nor GB18030"
    except OSError as error:
        layout = f"reject: cannot be read: {error.strerror}"
    except Broken as error:
        layout = f"reject: {error}"
    return File(source.name, source.split, str(path), size, modified, compression, layout, encoding or "utf-8")


def _read(stream: BinaryIO, size: int) -> bytes:
    """What can be read of `size` bytes: damage further on is for whoever reads that far."""
    content = b""
    try:
        while len(content) < size and (piece := stream.read1(size - len(content))):
            content += piece
    except Broken:
        if not content:
            raise
    return content


def _encoding_of(head: bytes, stream: BinaryIO) -> str | None:
    """Of the piece with the most bytes that are not ASCII, among those read until one has enough."""
    sample, most, edges = head, -1, ""
    for number in range(MAX_PROBES):
        foreign = len(head.translate(None, _ASCII))
        if foreign > most:
            sample, most = head, foreign
            # where pieces are cut, so may be a character
            edges = ("^@|" if number else "") + ("@$" if len(head) == PROBE_BYTES else "(?!)")
        if most >= ENOUGH_BYTES or len(head) < PROBE_BYTES:
            break
        head = _read(stream, PROBE_BYTES)
    return next((name for name in ("utf-8", "gb18030") if 2 * _invalid_bytes(sample, name, edges) <= most), None)


_ASCII = bytes(range(128))


def _invalid_bytes(sample: bytes, encoding: str, edges: str) -> int:
    """`edges`: pattern of what is not counted, with @ for up to three invalid bytes."""
    text = sample.decode(encoding, "surrogateescape")
    text = re.sub(edges.replace("@", "[\udc80-\udcff]{1,3}"), "", text)
    return len(re.findall("[\udc80-\udcff]", text))


def _layout_of(path: Path, head: bytes) -> str:
    name = path.name.lower()
    if any(name.endswith(".txt" + compression) for compression in COMPRESSIONS):
        return "text"
    start = head.removeprefix(codecs.BOM_UTF8).removeprefix(BOM_GB18030).lstrip()
    return "array" if start[:1] == b"[" or re.match(RECORDS, start) else "lines"


RECORDS = rb'\{\s*"RECORDS"\s*:\s*\['  # how some dumps of databases wrap their array


def cut_into_units(files: list[File]) -> list[Unit]:
    """The units of all files, in order."""
    total = sum(file.bytes for file in files)
    size = min(max(total // WANTED_UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    for file in files:
        if file.layout in ("lines", "text") and not file.compression:
            starts = range(0, max(file.bytes, 1), size)
            pieces = [(start, min(size, file.bytes - start)) for start in starts]
        elif file.layout == "parquet":
            pieces = _row_groups(file, size)
        else:
            pieces = [(0, file.bytes)]
        stops = [*(start for start, _ in pieces[1:]), None]
        for (start, count), stop in zip(pieces, stops, strict=True):
            units.append(Unit(len(units), file, start, stop, count))
    return units


def _row_groups(file: File, size: int) -> list[tuple[int, int]]:
    """The first row group of each unit and the bytes of the file that the unit stands for."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file.path) as opened:
            groups = [opened.metadata.row_group(group).total_byte_size for group in range(opened.num_row_groups)]
    except (OSError, ArrowException):
        return [(0, file.bytes)]  # whoever reads it reports it
    pieces, filled = [(0, 0)], 0
    for number, group in enumerate(groups):
        if filled >= size:
            pieces.append((number, 0))
            filled = 0
        filled += group
        first, count = pieces[-1]
        pieces[-1] = (first, count + group)
    total = max(sum(groups), 1)
    return [(first, file.bytes * count // total) for first, count in pieces]


class _Inflated(io.RawIOBase):
    """A compressed file as the bytes in it, frame after frame. Broken where it ends inside one or is damaged."""

    def __init__(self, file: BinaryIO, new: Callable, errors: tuple, name: str, piece_bytes: int):
        self._file, self._new, self._errors, self._name, self._piece = file, new, errors, name, piece_bytes
        self._codec, self._left, self._ready = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while not self._ready:
            piece, self._left = self._left or self._file.read(self._piece), b""
            if not piece:
                if self._codec:
                    raise Broken(f"truncated {self._name}")
                return 0
            if self._codec is None and not piece.strip(b"\0"):
                continue  # padding of tapes
            self._codec = self._codec or self._new()
            try:
                self._ready = memoryview(self._codec.decompress(piece))
            except self._errors:
                raise Broken(f"damaged {self._name}") from None
            if self._codec.eof:
                self._left, self._codec = self._codec.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def open_stream(path: Path | str, compression: str) -> BinaryIO:
    """`path`, decompressed and buffered. Pieces are small because a piece of zeros grows ten-thousandfold."""
    file = open(path, "rb")
    if compression == "gzip":
        raw = _Inflated(file, lambda: zlib.decompressobj(31), (zlib.error,), "gzip", 64 << 10)
    elif compression == "zstd":
        import zstandard

        new = zstandard.ZstdDecompressor().decompressobj
        raw = _Inflated(file, new, (zstandard.ZstdError,), "zstd", 4 << 10)
    else:
        return file
    return io.BufferedReader(raw, 1 << 18)

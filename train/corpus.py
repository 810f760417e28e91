"""Raw text files as documents, in memory that does not grow with them.

`.jsonl`: one JSON object per line; its text is under the key given, or under the first of TEXT_KEYS that holds a string
in the file's first such record. `.txt`: documents are separated by blank lines (the form of CLUECorpus), and keep their
line ends as "\\n". Both are UTF-8, with or without a byte order mark, and only "\\n" or "\\r\\n" end a line: U+2028,
U+2029 and U+0085, at which Python's splitlines would cut, are text.

A record that cannot be used becomes a Reject that says where and why. Nothing is repaired or guessed at.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from xiangxin_fast.errors import InputError

SUFFIXES = (".jsonl", ".txt")
TEXT_KEYS = ("text", "content", "段落", "data", "body", "raw_content", "内容", "正文")
MAX_RECORD_BYTES = 16 << 20
TOO_LONG = f"over {MAX_RECORD_BYTES >> 20} MiB"


@dataclass(frozen=True, slots=True)
class Document:
    """One document; `end` is how many bytes of its file are read with it."""

    text: str
    end: int


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that is left out; `line` counts from 1, 0 stands for the whole file."""

    file: str
    line: int
    reason: str
    end: int


class Corpus:
    """The documents and rejects of some files and directories, always in the same order.

    While it is iterated, `read_bytes` of `total_bytes` are done and `barren` lists the files that gave no document.
    """

    def __init__(self, inputs: list[Path], text_key: str | None = None):
        """Raises InputError for an input that is missing or of another kind, or a directory without .txt or .jsonl."""
        self.files = list(dict.fromkeys(file for path in inputs for file in _files_of(Path(path))))
        self.total_bytes = sum(file.stat().st_size for file in self.files)
        self.read_bytes = 0
        self.barren: list[Path] = []
        self._text_key = text_key

    def __iter__(self) -> Iterator[Document | Reject]:
        before, self.barren = 0, []
        for file in self.files:
            end, fruitful = 0, False
            for item in _items_of(file, self._text_key):
                end = item.end
                fruitful |= isinstance(item, Document)
                self.read_bytes = before + end
                yield item
            before += end
            if not fruitful:
                self.barren.append(file)


class _Unusable(Exception):
    """Why one record is left out, in words that are the same for all records with the same fault."""


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"{path}: expected {' or '.join(SUFFIXES)} files in this directory, found none")
        return files
    if not path.is_file():
        raise InputError(f"{path}: no such file or directory")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a directory or a file that ends in {' or '.join(SUFFIXES)}")
    return [path]


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None, int]]:
    """(number from 1, content or None where the line is too long, bytes read so far) of every line."""
    number = end = 0
    while content := stream.readline(MAX_RECORD_BYTES + 1):
        number, end = number + 1, end + len(content)
        if len(content) <= MAX_RECORD_BYTES:
            yield number, content.removeprefix(codecs.BOM_UTF8) if number == 1 else content, end
            continue
        while content and not content.endswith(b"\n"):
            content = stream.readline(MAX_RECORD_BYTES)
            end += len(content)
        yield number, None, end


def _items_of(file: Path, text_key: str | None) -> Iterator[Document | Reject]:
    end = 0
    try:
        with file.open("rb") as stream:
            for item in _jsonl(stream, file, text_key) if file.suffix == ".jsonl" else _txt(stream, file):
                end = item.end
                yield item
    except OSError as error:
        yield Reject(str(file), 0, f"cannot be read: {error.strerror}", end)


def _jsonl(stream: BinaryIO, file: Path, key: str | None) -> Iterator[Document | Reject]:
    for number, content, end in _lines(stream):
        try:
            line = _decoded(content)
            if not line.strip():
                continue
            record = _parsed(line)
            if key is None:
                key = next((name for name in TEXT_KEYS if isinstance(record.get(name), str)), None)
            yield Document(_text_of(record, key), end)
        except _Unusable as error:
            yield Reject(str(file), number, str(error), end)


def _txt(stream: BinaryIO, file: Path) -> Iterator[Document | Reject]:
    lines: list[str] = []
    size, fault = 0, None
    for number, content, end in _lines(stream):
        try:
            line = _decoded(content)
            if line.strip():
                size += len(content)
                lines.append(line.removesuffix("\n").removesuffix("\r"))
                if size > MAX_RECORD_BYTES:
                    raise _Unusable(TOO_LONG)
            elif fault or lines:
                yield fault or Document("\n".join(lines), end)
                lines, size, fault = [], 0, None
        except _Unusable as error:
            fault = fault or Reject(str(file), number, str(error), end)
        if fault:
            lines = []
    if fault or lines:
        yield fault or Document("\n".join(lines), end)


def _decoded(content: bytes | None) -> str:
    if content is None:
        raise _Unusable(TOO_LONG)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise _Unusable("not UTF-8") from None


def _parsed(line: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError also stands for a number of over 4,300 digits
        raise _Unusable("not JSON") from None
    if not isinstance(record, dict):
        raise _Unusable("not a JSON object")
    return record


def _text_of(record: dict, key: str | None) -> str:
    if key is None:
        raise _Unusable(f"no text under any of {', '.join(TEXT_KEYS)}")
    if key not in record:
        raise _Unusable(f"no key {key!r}")
    text = record[key]
    if not isinstance(text, str):
        raise _Unusable(f"{key!r} is not a string")
    if not text.strip():
        raise _Unusable("empty text")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
        raise _Unusable("lone surrogate") from None
    return text

"""The records of one unit, as text or as the reason why there is none.

JSON records are objects; their text is under the key given, or under the first of TEXT_KEYS that holds text: a string,
a list of strings, or MNBVC's list of paragraphs (those it marks as repeated are left out). Its question-and-answer
records have two keys. A title is put before the text unless the text begins with it. In .txt files documents are
separated by blank lines (CLUECorpus) and keep their line ends as "\\n". A file that begins with "[" is read as arrays,
whatever its name.

Only "\\n" or "\\r\\n" end a line: U+2028, U+2029 and U+0085, at which Python's splitlines would cut, are text. Nothing
is repaired or guessed at: a record that cannot be used is named with its file, offset (in bytes of the decompressed
file; in parquet the row), line where the file has lines, and the reason.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from .files import BOM_GB18030, RECORDS, Broken, Unit, open_stream

TEXT_KEYS = ("text", "content", "段落", "data", "body", "raw_content", "内容", "正文", "paragraphs")
TITLE_KEYS = ("title", "标题")
QUESTION, ANSWER = "问", "答"
PARAGRAPH, REPEATED = "内容", "是否重复"
MAX_RECORD_BYTES = 4 << 20  # of a line, and of text: encoding takes up to 270 bytes of memory for each
TOO_LONG = f"over {MAX_RECORD_BYTES >> 20} MiB"
CUT = "cut off by the end of the file"
PARQUET_ROWS = 256


class Record(NamedTuple):
    """One record: its text, or in `reason` why it has none. `line` of the unit, from 1, where the file has lines."""

    offset: int
    text: str | None
    reason: str | None
    line: int | None = None


class Unusable(Exception):
    """Why one record is left out, in words that are the same for all records with the same fault."""


class Reader:
    """Iterates over the records of `unit`; `position` counts the bytes of the file that are behind it, for progress.

    `lines`: how many lines start in the unit, once it has been read.
    """

    def __init__(self, unit: Unit, text_key: str | None, titles: bool):
        self._unit, self._key, self._titles = unit, text_key, titles
        self.position = self.lines = 0
        self._line = 0  # of the unit, from 1; goes on behind its end

    def __iter__(self) -> Iterator[Record]:
        file = self._unit.file
        offset = self._unit.start
        try:
            if file.layout.startswith("reject: "):
                raise Broken(file.layout.removeprefix("reject: "))
            if file.layout == "parquet":
                records = self._parquet()
            else:
                records = {"lines": self._lines, "text": self._text, "array": self._array}[file.layout]()
            for record in records:
                offset = record.offset
                yield record
        except Broken as error:
            yield Record(offset, None, str(error))
        except OSError as error:
            yield Record(offset, None, f"cannot be read: {error.strerror or 'input/output error'}")
        self.position = self._unit.bytes

    def _lines(self) -> Iterator[Record]:
        with open_stream(self._unit.file.path, self._unit.file.compression) as stream:
            for offset, content in self._raw_lines(stream):
                if content is not None and not content.strip():
                    continue
                if self._unit.stop is not None and offset >= self._unit.stop:
                    return
                record = self._record(offset, lambda content=content: self._parsed(self._decoded(content)))
                yield record._replace(line=self._line)

    def _text(self) -> Iterator[Record]:
        """A document is of the unit in which the blank line before it starts; the first unit has no such line."""
        lines: list[str] = []
        first, line, size, fault, skipping = 0, 0, 0, None, self._unit.start > 0
        with open_stream(self._unit.file.path, self._unit.file.compression) as stream:
            for offset, content in self._raw_lines(stream):
                blank = content is not None and not self._is_text(content)
                if skipping and not blank:
                    if self._unit.stop is not None and offset >= self._unit.stop:
                        return
                    continue
                skipping = False
                if blank:
                    if lines or fault:
                        yield (fault or self._record(first, functools.partial("\n".join, lines)))._replace(line=line)
                        lines, size, fault = [], 0, None
                    if self._unit.stop is not None and offset >= self._unit.stop:
                        return
                    continue
                if not lines and not fault:
                    first, line = offset, self._line
                try:
                    lines.append(self._decoded(content).removesuffix("\n").removesuffix("\r"))
                    size += len(content)
                    if size > MAX_RECORD_BYTES:
                        raise Unusable(TOO_LONG)
                except Unusable as error:
                    fault = fault or Record(first, None, str(error))
                if fault:
                    lines = []
        if lines or fault:
            yield (fault or self._record(first, functools.partial("\n".join, lines)))._replace(line=line)

    def _is_text(self, content: bytes) -> bool:
        if content.isspace():
            return False
        return len(content) > 64 or bool(content.decode(self._unit.file.encoding, "replace").strip())

    def _raw_lines(self, stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
        """(offset, content or None where it is too long) of the lines that start in the unit, and of those after it."""
        offset = self._unit.start
        if offset:
            stream.seek(offset - 1)
            offset -= 1
            while (piece := stream.readline(MAX_RECORD_BYTES)) and not piece.endswith(b"\n"):
                offset += len(piece)
                if self._unit.stop is not None and offset >= self._unit.stop:
                    return  # all of it is inside one line
            offset += len(piece)
        begin = offset
        while content := stream.readline(MAX_RECORD_BYTES + 1):
            start, offset = offset, offset + len(content)
            self._line += 1
            self.lines += self._unit.stop is None or start < self._unit.stop
            if len(content) > MAX_RECORD_BYTES:
                piece = content
                while piece and not piece.endswith(b"\n"):
                    piece = stream.readline(MAX_RECORD_BYTES)
                    offset += len(piece)
                content = None
            elif start == 0:
                content = content.removeprefix(codecs.BOM_UTF8).removeprefix(BOM_GB18030)
            self.position = stream.raw.tell() if self._unit.file.compression else offset - begin
            yield start, content

    def _decoded(self, content: bytes | None) -> str:
        if content is None:
            raise Unusable(TOO_LONG)
        try:
            return content.decode(self._unit.file.encoding)
        except UnicodeDecodeError:
            raise Unusable(f"not {self._unit.file.encoding.upper()}") from None

    def _parsed(self, line: str) -> str:
        try:
            # not strict: unescaped control characters inside strings are common, and normalisation removes them
            value = json.loads(line, strict=False)
        except (ValueError, RecursionError):  # ValueError also stands for a number of over 4,300 digits
            raise Unusable("not JSON") from None
        return self._text_of(value)

    def _record(self, offset: int, text_of) -> Record:
        try:
            text = text_of()
            if not text.strip():
                raise Unusable("empty text")
            try:
                size = len(text.encode())
            except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
                raise Unusable("lone surrogate") from None
            if size > MAX_RECORD_BYTES:
                raise Unusable(TOO_LONG)
            return Record(offset, text, None)
        except Unusable as error:
            return Record(offset, None, str(error))

    def _text_of(self, record: object) -> str:
        if isinstance(record, str):  # an array of texts
            return record
        if not isinstance(record, dict):
            raise Unusable("not a JSON object")
        if self._key is not None:
            if self._key not in record:
                raise Unusable(f"no key {self._key!r}")
            text = _joined(record[self._key])
            if text is None:
                raise Unusable(f"{self._key!r} holds no text")
        elif isinstance(record.get(QUESTION), str) and isinstance(record.get(ANSWER), str):
            text = f"{record[QUESTION]}\n{record[ANSWER]}"
        else:
            texts = [text for key in TEXT_KEYS if (text := _joined(record.get(key))) is not None]
            text = next((text for text in texts if text.strip()), "")
            if not texts:
                raise Unusable(f"no text under any of {', '.join(TEXT_KEYS)}")
        if self._titles and text.strip():
            title = next((record[key] for key in TITLE_KEYS if isinstance(record.get(key), str)), "").strip()
            if title and not text.lstrip().startswith(title):
                text = f"{title}\n{text}"
        return text

    def _array(self) -> Iterator[Record]:
        file = self._unit.file
        with open_stream(file.path, file.compression) as stream:
            for offset, element in _elements(stream, file.encoding):
                self.position = stream.raw.tell()
                if isinstance(element, Unusable):
                    yield Record(offset, None, str(element))
                elif re.search("[\udc80-\udcff]", element):
                    yield Record(offset, None, f"not {file.encoding.upper()}")
                else:
                    yield self._record(offset, lambda element=element: self._parsed(element))

    def _parquet(self) -> Iterator[Record]:
        from pyarrow import ArrowException, parquet

        try:
            # buffered, a column is read bit by bit and not a row group at a time
            with parquet.ParquetFile(self._unit.file.path, buffer_size=1 << 20, pre_buffer=False) as opened:
                stop = opened.num_row_groups if self._unit.stop is None else self._unit.stop
                wanted = {self._key, *TITLE_KEYS} if self._key else {*TEXT_KEYS, *TITLE_KEYS, QUESTION, ANSWER}
                columns = [name for name in opened.schema_arrow.names if name in wanted]
                if not columns:
                    raise Broken(f"no column of text among {', '.join(opened.schema_arrow.names)[:200]}")
                rows = [opened.metadata.row_group(group).num_rows for group in range(stop)]
                first = row = sum(rows[: self._unit.start])
                groups = range(self._unit.start, stop)
                for batch in opened.iter_batches(PARQUET_ROWS, row_groups=list(groups), columns=columns):
                    for record in _rows(batch):
                        if record is None:
                            yield Record(row, None, "not UTF-8")
                        else:
                            yield self._record(row, lambda record=record: self._text_of(_present(record)))
                        row += 1
                    self.position = self._unit.bytes * (row - first) // (sum(rows) - first)
        except ArrowException as error:
            raise Broken(f"damaged parquet: {' '.join(str(error).split())[:100]}") from None


def _rows(batch) -> list[dict | None]:
    """The rows of a pyarrow.RecordBatch, None for those whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for number in range(len(batch)) for row in _rows(batch.slice(number, 1))]


def _present(record: dict) -> dict:
    return {key: value for key, value in record.items() if value is not None}


def _joined(value: object) -> str | None:
    """The text in a string, in a list of strings or in MNBVC's paragraphs."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(part, str) for part in value):
        return "\n".join(value)
    if all(isinstance(part, dict) and isinstance(part.get(PARAGRAPH), str) for part in value):
        return "\n".join(part[PARAGRAPH] for part in value if part.get(REPEATED) is not True)
    return None


# a whole string; a bracket; a quote whose string is not whole yet
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]]|"', re.DOTALL)
_NEXT_OBJECT = re.compile(r"\}\s*,\s*(?=\{)")


def _elements(stream: BinaryIO, encoding: str) -> Iterator[tuple[int, str | Unusable]]:
    """The elements of JSON arrays and their offsets, in memory of one element; invalid bytes come as surrogates.

    What follows an array is read on: further arrays, or objects, where the file has records line by line after all.

    Brackets are balanced outside strings to find where an element ends; whether it is JSON is for the caller to see.
    """
    window = _Window(stream, encoding)
    while (opening := re.match(rf"\ufeff?\s*(?:{RECORDS.decode()}|\[)", window.text)) is None:
        if len(window.text) > 1 << 16 or not window.read():
            raise Broken("expected a JSON array")
    scan = last = opening.end()  # where scanning goes on; where the last element ended
    start, depth, lost = last, 0, False  # where this one starts; how many brackets are open; whether its end is unknown
    inside = True  # an array
    while True:
        if lost and (following := _NEXT_OBJECT.search(window.text)):
            window.drop(following.end())
            scan = last = start = depth = 0
            lost = False
        for token in () if lost else _TOKEN.finditer(window.text, scan):
            mark, scan = token[0], token.end()
            if mark == '"':
                scan -= 1
                break
            if depth == 0:
                start = token.start()
                if window.text[last:start].strip(" \t\r\n,"):
                    yield window.offset_of(last), Unusable("not a JSON object")
                if mark in "]}" or (mark == "[" and not inside):
                    inside = mark == "["
                    last = start = scan
                    continue
            depth += (mark in "{[") - (mark in "}]")
            if depth == 0:
                yield window.offset_of(start), window.text[start:scan]
                last = start = scan
        window.drop(start)
        scan, last, start = scan - start, 0, 0
        if len(window.text) > MAX_RECORD_BYTES:
            if not lost:
                yield window.offset_of(0), Unusable(TOO_LONG)
            lost = True
        if lost:
            window.drop(max(0, len(window.text) - 64))
        if not window.read():
            if inside or depth or lost:
                yield window.offset_of(0), Unusable(CUT)
            elif window.text.strip():
                yield window.offset_of(0), Unusable("not a JSON object")
            return


class _Window:
    """The decoded part of a stream that is in hand, and where in the stream that is."""

    def __init__(self, stream: BinaryIO, encoding: str):
        self._stream, self._encoding = stream, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
        self._known = self._bytes = 0  # character of `text` whose offset is known, and that offset
        self._ended = False
        self.text = ""

    def read(self) -> bool:
        """More of the stream, as much again as is in hand; False at its end."""
        if self._ended:
            return False
        piece = self._stream.read1(max(1 << 18, len(self.text)))
        self._ended = not piece
        self.text += self._decoder.decode(piece, self._ended)
        return not self._ended

    def offset_of(self, index: int) -> int:
        """Bytes of the stream before character `index`; indices must not fall."""
        self._bytes += len(self.text[self._known : index].encode(self._encoding, "surrogateescape"))
        self._known = index
        return self._bytes

    def drop(self, count: int) -> None:
        """Lets go of the first `count` characters."""
        self.offset_of(count)
        self.text, self._known = self.text[count:], 0

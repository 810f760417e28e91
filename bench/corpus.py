"""A made-up Chinese corpus with everything that goes wrong in real ones, the same for the same seed.

    python -m bench.corpus DIR --megabytes 1000

Words are Zipf-distributed over a lexicon made from the seed. DIR gets corpus/ with the formats that train/prepare.py
reads, benchmark/ with a made-up C-Eval subject whose items are planted in some documents, and planted.json: how many
documents of each kind were put in.
"""

import argparse
import csv
import gzip
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard

from train.corpus.records import MAX_RECORD_BYTES

LEXICON = 30_000
CHARACTERS = "".join(map(chr, range(0x4E00, 0x4E00 + 3500)))
MARKS = ("，", "，", "，", "。", "。", "、", "；", "！", "？", "：")
DOCUMENT_WORDS = 200  # on average; about 400 characters
ITEMS = 40
KINDS = {  # share of all documents
    "exact copy": 0.03,
    "near copy": 0.03,
    "short": 0.02,
    "english": 0.02,
    "repetition": 0.01,
    "boilerplate": 0.01,
    "mis-decoded": 0.005,
    "contaminated": 0.002,
    "messy": 0.03,
}
BAD_LINES = (
    b'{"text": "\xff\xfe"}',
    b'{"text": "cut',
    b"[1, 2]",
    b'{"text": null}',
    b'{"text": "\\ud83d"}',
    b'{"x": 1}',
)


class Maker:
    """Documents one after the other. `planted` counts them by kind."""

    def __init__(self, seed: int, copies: float = KINDS["exact copy"]):
        self._shares = KINDS | {"exact copy": copies}
        self._numpy, self.random = np.random.default_rng(seed), random.Random(seed)
        lengths = self._numpy.choice([1, 2, 3, 4], LEXICON, p=[0.1, 0.6, 0.2, 0.1])
        ranks = np.arange(1, len(CHARACTERS) + 1)
        self._alphabet = 1 / ranks / (1 / ranks).sum()
        drawn = self._numpy.choice(len(CHARACTERS), int(lengths.sum()), p=self._alphabet)
        text = "".join(CHARACTERS[index] for index in drawn)
        ends = np.cumsum(lengths)
        self._words = [text[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        weights = 1 / (np.arange(LEXICON) + 10)
        self._cumulative = np.cumsum(weights / weights.sum())
        self.items = [self._item() for _ in range(ITEMS)]
        self.planted: Counter[str] = Counter()
        self._earlier: list[str] = []

    def words(self, count: int) -> list[str]:
        """Words by their frequency, with punctuation in between."""
        drawn = np.searchsorted(self._cumulative, self._numpy.random(count)).tolist()
        words = [self._words[min(index, LEXICON - 1)] for index in drawn]
        for place in range(self.random.randint(3, 8), count, self.random.randint(5, 9)):
            words[place] += MARKS[place % len(MARKS)]
        return words

    def _item(self) -> dict[str, str]:
        question = "".join(self.words(12)).rstrip("".join(MARKS)) + "____。"
        options = {letter: "".join(self.words(3)).rstrip("".join(MARKS)) for letter in "ABCD"}
        return {"question": question, **options, "answer": self.random.choice("ABCD")}

    def documents(self) -> Iterator[tuple[str, str]]:
        """(kind, text) without end."""
        kinds, shares = [*self._shares, "clean"], [*self._shares.values(), 1 - sum(self._shares.values())]
        while True:
            kind = self.random.choices(kinds, shares)[0]
            count = max(30, int(self.random.lognormvariate(np.log(DOCUMENT_WORDS), 0.6)))
            text = "".join(self.words(count))
            if kind in ("exact copy", "near copy"):
                if not self._earlier:
                    kind = "clean"
                else:
                    text = self.random.choice(self._earlier)
            make = {
                "near copy": self._near,
                "short": lambda text: text[:12],
                "english": lambda text: "The model reads this page. " + " ".join(map(str, range(len(text)))),
                "repetition": lambda text: text[:40] * 20,
                "boilerplate": lambda text: (
                    f"{text[:60]}\n版权所有 {text[60:70]} ICP备{len(text)}号 联系我们 {text[70:80]}"
                ),
                "mis-decoded": lambda text: text[:200].replace(text[5], "锟斤拷"),
                "contaminated": self._contaminated,
                "messy": self._messy,
            }.get(kind, lambda text: text)
            text = make(text)
            self.planted[kind] += 1
            if kind == "clean" and len(self._earlier) < 2000:
                self._earlier.append(text)
            yield kind, text

    def _near(self, text: str) -> str:
        place = self.random.randrange(len(text) // 2)
        return text[:place] + "".join(self.words(2)) + text[place + 3 :] + "（转载）"

    def _contaminated(self, text: str) -> str:
        item = self.random.choice(self.items)
        question = item["question"]
        variants = (
            lambda: question,
            lambda: question.replace("，", " , ").replace("。", "."),
            lambda: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in question),
            lambda: "\n".join(question[i : i + 7] for i in range(0, len(question), 7)),
        )
        place = len(text) // 2
        return text[:place] + self.random.choice(variants)() + text[place:]

    def _messy(self, text: str) -> str:
        cuts = sorted(self.random.sample(range(len(text)), 6))
        mess = ["\u200b", "\u2028", "\ufeff", "\x07", "\r\n\r\n\r\n\r\n", "\u3000\n\u3000\u3000"]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        return "".join(piece + mark for piece, mark in zip(pieces, [*mess, ""], strict=True))


def write_corpus(
    directory: Path, megabytes: float, seed: int = 1, copies: float = KINDS["exact copy"], gigantic: bool = True
) -> dict[str, int]:
    """Writes the corpus in equal parts of every format, and returns what was planted.

    `copies`: share of exact ones. `gigantic`: with a line of 17 MiB, and a text that is almost as long as one may be.
    """
    maker = Maker(seed, copies)
    documents = maker.documents()
    corpus, benchmark = directory / "corpus", directory / "benchmark"
    for path in (corpus, benchmark):
        path.mkdir(parents=True)
    with (benchmark / "made-up_val.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "question", "A", "B", "C", "D", "answer"])
        writer.writeheader()
        writer.writerows({"id": number, **item} for number, item in enumerate(maker.items))

    def take(limit: float) -> Iterator[str]:
        size = 0
        while size < limit:
            text = next(documents)[1]
            size += len(text.encode("utf-8", "replace"))
            yield text

    writers = (_web, _arrays, _paragraphs, _zstd, _books, _gb18030, _parquet)
    for write in writers:
        write(corpus, take(megabytes * 1e6 / len(writers)), maker)
    if gigantic:
        _gigantic(corpus, maker)
    planted = dict(sorted(maker.planted.items()))
    (directory / "planted.json").write_text(json.dumps(planted, indent=2) + "\n")
    return planted


def _json(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _web(corpus: Path, texts: Iterator[str], maker: Maker) -> None:
    """SkyPile's lines, among them what no reader of JSON can use."""
    with (corpus / "web.jsonl").open("wb") as stream:
        for number, text in enumerate(texts):
            if number % 200 == 7:
                stream.write(BAD_LINES[number // 200 % len(BAD_LINES)] + b"\n")
                maker.planted["unusable line"] += 1
            stream.write(_json({"text": text}) + b"\n")


def _gigantic(corpus: Path, maker: Maker) -> None:
    longest = "".join(maker.words(MAX_RECORD_BYTES // 5)).encode()[: MAX_RECORD_BYTES - 64].decode("utf-8", "ignore")
    lines = b'{"text": "' + b"x" * (17 << 20) + b'"}', _json({"text": longest})
    (corpus / "gigantic.jsonl").write_bytes(b"\n".join(lines))
    maker.planted["unusable line"] += 1
    maker.planted["clean"] += 1


def _arrays(corpus: Path, texts: Iterator[str], maker: Maker) -> None:
    """WuDao's arrays."""
    with (corpus / "part-0001.json").open("wb") as stream:
        for number, text in enumerate(texts):
            stream.write(b",\n" if number else b"[")
            stream.write(_json({"id": number, "title": text[:8], "content": text}))
        stream.write(b"]")


def _paragraphs(corpus: Path, texts: Iterator[str], maker: Maker) -> None:
    """MNBVC's paragraphs in gzip, and a second file that is cut off."""
    with gzip.open(corpus / "mnbvc.jsonl.gz", "wb", compresslevel=1) as stream:
        for text in texts:
            lines = [{"行号": n, "是否重复": False, "内容": line} for n, line in enumerate(text.split("\n"))]
            stream.write(_json({"文件名": "a.txt", "段落": lines}) + b"\n")
    whole = gzip.compress(b"".join(_json({"text": "".join(maker.words(200))}) + b"\n" for _ in range(50)), mtime=0)
    (corpus / "truncated.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    maker.planted["clean"] += zlib.decompressobj(31).decompress(whole[: len(whole) // 2]).count(b"\n")


def _zstd(corpus: Path, texts: Iterator[str], maker: Maker) -> None:
    """CCI's records in Zstandard."""
    with (corpus / "cci.jsonl.zst").open("wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as stream:
        for number, text in enumerate(texts):
            stream.write(_json({"id": str(number), "content": text}) + b"\n")


def _books(corpus: Path, texts: Iterator[str], maker: Maker) -> None:
    """CLUECorpus: documents between blank lines."""
    with (corpus / "clue.txt").open("wb") as stream:
        for text in texts:
            lines = [line for line in text.replace("\r", "").split("\n") if line.strip()]
            stream.write("\n".join(lines).encode() + b"\n\n")


def _gb18030(corpus: Path, texts: Iterator[str], maker: Maker) -> None:
    with (corpus / "old.jsonl").open("wb") as stream:
        for text in texts:
            stream.write(json.dumps({"正文": text}, ensure_ascii=False).encode("gb18030") + b"\n")


def _parquet(corpus: Path, texts: Iterator[str], maker: Maker) -> None:
    """Wikipedia's columns."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("id", pyarrow.string()), ("title", pyarrow.string()), ("text", pyarrow.string())])
    with parquet.ParquetWriter(corpus / "wiki.parquet", schema) as writer:
        rows: list[dict] = []
        for number, text in enumerate(texts):
            rows.append({"id": str(number), "title": text[:6], "text": text})
            if len(rows) == 2000:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--megabytes", type=float, default=1000.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(json.dumps(write_corpus(arguments.directory, arguments.megabytes, arguments.seed), indent=2))


if __name__ == "__main__":
    main()

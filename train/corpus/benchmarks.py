"""Decontamination: documents that hold an item of a benchmark are left out.

Text is compared as units (fold.py): CJK characters and ASCII words after NFKC and case folding, without punctuation, so
that width, punctuation and line breaks do not hide an item. A document is contaminated when it shares

  - NGRAM = 13 units in a row with an item (the length of GPT-3's appendix C; no accidental hits between modern Chinese
    texts of one domain, where 8 units had a dozen), or
  - all units of an item that has 8 to 12 of them. Shorter ones say too little; they are counted as uncheckable.

What is compared is an item's question, and its question followed by the right answer and by all options: runs that
start in the question. An option alone is often a sentence of many textbooks. Runs that more than TEMPLATE items of one
benchmark share are its phrasing ("Which of the following sentences ...") and left out. A BIG-bench canary is an item of
its own. The whole document goes: pages that quote one item tend to quote more.

Formats as published: C-Eval and CMMLU .csv, HumanEval .jsonl(.gz), GSM8K .jsonl, BBH .json; directories of them.
"""

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xiangxin_fast.errors import InputError

from .files import GZIP, Broken, open_stream
from .fold import Folded, fold, grams, units

NGRAM, SHORTEST = 13, 8
TEMPLATE = 10
CANARY = re.compile(r"canary GUID\s+([0-9a-f-]{36})", re.IGNORECASE)
CANARY_UNITS = 5  # a GUID is five words
SUFFIXES = (".csv", ".jsonl", ".jsonl.gz", ".json")
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Item:
    """One question of a benchmark and the texts that may follow it."""

    question: str
    continuations: tuple[str, ...] = ()
    canary: bool = False


def read_items(path: Path) -> list[Item]:
    """The items of one file. InputError where it is none of the published formats."""
    try:
        compression = "gzip" if path.open("rb").read(2) == GZIP else ""
        with open_stream(path, compression) as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"{path}: expected a benchmark of at most {MAX_BYTES >> 20} MiB, got more")
        text = content.decode("utf-8-sig")
        name = path.name.removesuffix(".gz")
        if name.endswith(".csv"):
            items = [_of_row(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        elif name.endswith(".jsonl"):
            items = [_of_record(json.loads(line)) for line in text.split("\n") if line.strip()]
        else:
            items = [Item(example["input"], (example["target"],)) for example in json.loads(text)["examples"]]
        if not items or not all(
            isinstance(part, str) for item in items for part in (item.question, *item.continuations)
        ):
            raise ValueError("no items")
    except (OSError, Broken, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise InputError(
            f"{path}: expected a benchmark as C-Eval, CMMLU (.csv), HumanEval, GSM8K (.jsonl) or BBH (.json) have it, "
            f"got {type(error).__name__}: {' '.join(str(error).split())[:100]}"
        ) from None
    return items + [Item(guid, canary=True) for guid in sorted(set(CANARY.findall(text)))]


def _of_row(row: dict[str, str]) -> Item:
    """C-Eval: id,question,A,B,C,D,answer[,explanation], without answer in test; CMMLU: ,Question,A,B,C,D,Answer."""
    row = {(key or "").lower(): value or "" for key, value in row.items() if not isinstance(value, list)}
    options = " ".join(f"{letter} {row[letter]}" for letter in "abcd")
    right = row.get(row.get("answer", "").strip().lower(), "")
    return Item(row["question"], (options, right) if right else (options,))


def _of_record(record: dict) -> Item:
    if "prompt" in record:
        return Item(record["prompt"], (record["canonical_solution"],))
    return Item(record["question"], (re.sub("<<.*?>>", "", record["answer"]),))


def files_of(path: Path) -> list[Path]:
    """Benchmark files in a directory, or the one file. InputError where there is none."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if found:
            return found
        raise InputError(f"{path}: expected benchmark files ({', '.join(SUFFIXES)}) in this directory, found none")
    if not path.is_file():
        raise InputError(f"{path}: no such file or directory")
    return [path]


class Benchmarks:
    """The items of some benchmark files or directories, as hashes; a benchmark is called like its file or directory."""

    def __init__(self, paths: list[Path]):
        self.names: list[str] = []
        self.items: list[str] = []  # "<benchmark>: <start of the question>"
        self.counts: dict[str, dict[str, int]] = {}
        found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for path in paths:
            items = [item for file in files_of(path) for item in read_items(file)]
            name = re.sub(r"(\.jsonl|\.json|\.csv)(\.gz)?$", "", path.name or path.resolve().name)
            self._add(name, items, found)
        self._hashes, self._items, self._filters, self._shifts = {}, {}, {}, {}
        for length, pieces in found.items():
            hashes, numbers = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
            hashes, first = np.unique(hashes, return_index=True)
            self._hashes[length], self._items[length] = hashes, numbers[first]
            self._shifts[length] = np.uint64(64 - max(10, len(hashes).bit_length() + 5))  # one bit in 32 is set
            place = hashes >> self._shifts[length]
            self._filters[length] = np.zeros(1 << 61 - int(self._shifts[length]), np.uint8)
            np.bitwise_or.at(self._filters[length], place >> np.uint64(3), _bit(place))

    def _add(self, name: str, items: list[Item], found: dict) -> None:
        if not items:
            return
        texts, owners, asked = [], [], []  # what is compared; whose it is; how many characters of it the question has
        for number, item in enumerate(items):
            for text in (item.question, *(f"{item.question}\n{after}" for after in item.continuations)):
                texts.append(text)
                owners.append(number)
                asked.append(item.question)
        folded = fold(texts)
        hashes, documents, _ = units(folded)
        questions = np.bincount(units(fold(asked))[1], minlength=len(texts))  # in units
        lengths = np.bincount(documents, minlength=len(texts))
        base, owners = len(self.items), np.array(owners)
        checkable = np.zeros(len(items), bool)
        first_unit = np.cumsum(lengths) - lengths
        for length in range(CANARY_UNITS, NGRAM + 1):
            runs, starts = grams(hashes, documents, length)
            owner = documents[starts]
            canary = np.array([items[number].canary for number in owners[owner]], bool)
            whole = (lengths[owner] == length) & (canary | (length >= SHORTEST))
            chosen = (starts - first_unit[owner] < questions[owner]) if length == NGRAM else whole
            runs, numbers = runs[chosen], owners[owner[chosen]]
            if length == NGRAM:
                order = np.lexsort((numbers, runs))
                ordered, owned = runs[order], numbers[order]
                again = (np.diff(ordered) == 0) & (np.diff(owned) == 0)  # within one item
                shared, times = np.unique(ordered[np.append(True, ~again)[: len(ordered)]], return_counts=True)
                keep = ~np.isin(runs, shared[times > TEMPLATE])
                runs, numbers = runs[keep], numbers[keep]
            checkable[numbers] = True
            if len(runs):
                found.setdefault(length, []).append((runs, numbers + base))
        self.names.append(name)
        self.items += [f"{name}: {' '.join(item.question.split())[:80]}" for item in items]
        self.counts[name] = {"items": len(items), "uncheckable": int((~checkable).sum())}

    def find(self, folded: Folded) -> dict[int, int]:
        """Document -> number of an item it holds, for the documents of a batch that hold one."""
        hashes, documents, _ = units(folded)
        hits: dict[int, int] = {}
        for length in sorted(self._hashes, reverse=True):
            runs, starts = grams(hashes, documents, length)
            place = runs >> self._shifts[length]
            maybe = np.flatnonzero(self._filters[length][place >> np.uint64(3)] & _bit(place))
            if not len(maybe):
                continue
            index = np.minimum(np.searchsorted(self._hashes[length], runs[maybe]), len(self._hashes[length]) - 1)
            for run, entry in zip(maybe, index, strict=True):
                if self._hashes[length][entry] == runs[run]:
                    hits.setdefault(int(documents[starts[run]]), int(self._items[length][entry]))
        return hits


def _bit(place: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint8(1), (place & np.uint64(7)).astype(np.uint8))

"""Texts of a batch as arrays of characters, and hashes of their n-grams: what filters, MinHash and decontamination use.

`fold` applies NFKC and case folding, so that width, case and compatibility forms do not count, and tells each
character's kind. All arithmetic on hashes is modulo 2^64.
"""

import functools
import unicodedata
from dataclasses import dataclass

import numpy as np

OTHER, SPACE, LETTER, WORD, CHARACTER, HAN = range(6)  # WORD: ASCII letters and digits; CHARACTER: kana, hangul, ...
_HAN = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x323B0), (0x3007, 0x3008))
# all other code points are Han and Hangul, which fold to themselves, or have no meaning yet
_IRREGULAR = ((0, 0x3400), (0x4DC0, 0x4E00), (0xA000, 0xAC00), (0xD7A4, 0xD800), (0xE000, 0x18000), (0x1B000, 0x20000))
_IRREGULAR += ((0x2F800, 0x2FA20),)
_CHARACTERS = ((0x3040, 0x3100), (0x3100, 0x3130), (0x31A0, 0x3200), (0xAC00, 0xD7A4))


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every code point: the one it folds to, uint32; the kind of that, uint8; whether folding takes more, bool."""
    folds = np.arange(0x110000, dtype=np.uint32)
    kinds, several = np.zeros(0x110000, np.uint8), np.zeros(0x110000, bool)
    for start, stop in _IRREGULAR:
        for code in range(start, stop):
            folded = unicodedata.normalize("NFKC", chr(code)).casefold()
            folds[code] = ord(folded[0])
            several[code] = (len(folded) > 1 and any(map(str.isalnum, folded))) or unicodedata.combining(chr(code))
            kinds[code] = LETTER if folded[0].isalnum() else SPACE if folded[0].isspace() else OTHER
    for code in "abcdefghijklmnopqrstuvwxyz0123456789":
        kinds[ord(code)] = WORD
    for ranges, kind in ((_CHARACTERS, CHARACTER), (_HAN, HAN)):
        for start, stop in ranges:
            kinds[start:stop] = kind
    return folds, kinds[folds], several


@dataclass(frozen=True)
class Folded:
    """A batch: characters uint32 [n], their kinds uint8 [n], the document of each int32 [n], number of documents."""

    codes: np.ndarray
    kinds: np.ndarray
    documents: np.ndarray
    count: int

    def only(self, kept: np.ndarray) -> "Folded":
        """The characters where `kept` (bool [n]) holds."""
        return Folded(self.codes[kept], self.kinds[kept], self.documents[kept], self.count)

    def tally(self, chosen: np.ndarray) -> np.ndarray:
        """How many characters of each document are chosen (bool [n]): int64 [documents]."""
        return np.bincount(self.documents[chosen], minlength=self.count)


def fold(texts: list[str]) -> Folded:
    """The texts without differences of width, case and compatibility; marks such as "…" count as one character."""
    folds, kinds, several = _tables()
    codes = _codes(texts)
    documents = _documents(texts)
    if (found := several[codes]).any():
        texts = list(texts)
        for document in np.unique(documents[found]):
            texts[document] = unicodedata.normalize("NFKC", texts[document]).casefold()
        codes, documents = _codes(texts), _documents(texts)
    return Folded(folds[codes], kinds[codes], documents, len(texts))


def _codes(texts: list[str]) -> np.ndarray:
    return np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")


def _documents(texts: list[str]) -> np.ndarray:
    return np.repeat(np.arange(len(texts), dtype=np.int32), [len(text) for text in texts])


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on uint64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


def grams(values: np.ndarray, documents: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of `n` values inside one document, uint64 [m], and where each starts, int64 [m]."""
    if len(values) < n:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    last = len(values) - n + 1
    total = np.zeros(last, np.uint64)
    for i in range(n):
        total *= np.uint64(_BASE)
        total += values[i : i + last]
    starts = np.flatnonzero(documents[:last] == documents[n - 1 :])
    return mix(total[starts]), starts


def units(folded: Folded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The batch as decontamination compares it: CJK characters and ASCII words, everything else dropped.

    Returns hashes uint64 [u], documents int32 [u] and the character each unit starts at, int64 [u].
    """
    kept = np.flatnonzero(folded.kinds >= WORD)
    if not len(kept):
        return np.empty(0, np.uint64), np.empty(0, np.int32), kept
    word = folded.kinds[kept] == WORD
    inside = np.zeros(len(kept), bool)  # goes on with the word before it
    inside[1:] = word[1:] & word[:-1] & (np.diff(kept) == 1) & (np.diff(folded.documents[kept]) == 0)
    starts = np.flatnonzero(~inside)
    place = np.arange(len(kept)) - np.repeat(starts, np.diff(starts, append=len(kept)))
    hashes = mix(folded.codes[kept].astype(np.uint64) + (place.astype(np.uint64) << np.uint64(32)) + np.uint64(1))
    return np.add.reduceat(hashes, starts), folded.documents[kept[starts]], kept[starts]

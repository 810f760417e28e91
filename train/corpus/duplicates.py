"""Exact and near-duplicates: of documents that share a column of their signature, the first is kept.

Column 0 is a hash of the text. Columns 1..BANDS are MinHash bands (Broder 1997; banding: Leskovec, Rajaraman, Ullman,
Mining of Massive Datasets, 3.4): of the document's runs of SHINGLE letters and digits after folding, HASHES minima are
taken, and ROWS of them are hashed into each band. Two documents whose sets of runs have Jaccard similarity s share a
band with probability 1 - (1 - s^ROWS)^BANDS, for 14 bands of 8:

    s   0.5   0.6   0.7   0.75  0.8   0.85  0.9   0.95
    p   0.053 0.211 0.565 0.772 0.924 0.988 0.9996 1 - 2e-7

A document is dropped when an earlier one shares a column with it, kept or not. That needs no graph: every column falls
into ranges of hashes which are sorted apart from each other, so memory is that of RANGE_DOCUMENTS hashes in each
process (163 MB, and 16 bytes for each copy in the range) and one byte per document in the parent. On disk a document
takes 12 bytes for each column: for 100 million documents 18 GB, read once, and 100 MB of memory in the parent.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .fold import SPACE, Folded, grams, mix

SHINGLE = 5
BANDS, ROWS = 14, 8
HASHES = BANDS * ROWS
COLUMNS = 1 + BANDS
RANGE_DOCUMENTS = 1 << 22
KEPT, EXACT, NEAR = range(3)
BLOCK = 1 << 15  # shingles that are hashed while they are in the second-level cache

_SEEDS = mix(np.arange(1, 2 * HASHES + 1, dtype=np.uint64))
_FACTORS, _MASKS = (_SEEDS[:HASHES] >> np.uint64(32)).astype(np.uint32) | 1, _SEEDS[HASHES:].astype(np.uint32)


def minhash(folded: Folded) -> np.ndarray:
    """HASHES minima over the shingles of each document: uint32 [documents, HASHES], the largest value where none is.

    A document with fewer letters than a shingle has no minima: it is not near anything.
    """
    letters = folded.only(folded.kinds > SPACE)
    hashes, starts = grams(letters.codes, letters.documents, SHINGLE)
    hashes = (hashes >> np.uint64(32)).astype(np.uint32)
    documents = letters.documents[starts]
    minima = np.full((HASHES, folded.count), 0xFFFFFFFF, np.uint32)
    for start in range(0, len(hashes), BLOCK):
        block = hashes[start : start + BLOCK]
        inside, first = np.unique(documents[start : start + BLOCK], return_index=True)
        values = np.empty_like(block)
        for i in range(HASHES):
            np.bitwise_xor(block, _MASKS[i], out=values)
            np.multiply(values, _FACTORS[i], out=values)
            minima[i, inside] = np.minimum(minima[i, inside], np.minimum.reduceat(values, first))
    return minima.T


def signatures(exact: np.ndarray, minima: np.ndarray | None) -> np.ndarray:
    """Columns of the documents' signatures: uint64 [1 or COLUMNS, documents]. `exact`: uint64 [documents]."""
    if minima is None:
        return exact[None]
    bands = minima.reshape(-1, BANDS, ROWS).astype(np.uint64)
    joined = np.zeros(bands.shape[:2], np.uint64)
    for row in range(ROWS):
        joined = mix(joined + bands[:, :, row] + np.uint64(row + 1))
    nothing = (minima == 0xFFFFFFFF).all(1)
    joined[nothing] = exact[nothing, None]
    return np.concatenate([exact[None], joined.T])


@dataclass(frozen=True)
class Segment:
    """Where the signatures of a run of documents are: `hashes` uint64 and `places` uint32 [columns, documents] in two
    .npy files, each column sorted by hash; document `first` + place."""

    hashes: str
    places: str
    first: int
    documents: int


def save_signatures(columns: np.ndarray, hashes: Path, places: Path) -> None:
    """Writes what a Segment points to."""
    order = np.argsort(columns, axis=1, kind="stable")
    np.save(hashes, np.take_along_axis(columns, order, 1), allow_pickle=False)
    np.save(places, order.astype(np.uint32), allow_pickle=False)


def ranges(documents: int) -> list[tuple[int, int]]:
    """Ranges of 64-bit hashes, lowest and highest, of about RANGE_DOCUMENTS documents each."""
    count = max(1, -(-documents // RANGE_DOCUMENTS))
    bounds = [(i << 64) // count for i in range(count + 1)]
    return [(low, high - 1) for low, high in itertools.pairwise(bounds)]


def later_copies(segments: list[Segment], column: int, low: int, high: int) -> np.ndarray:
    """Documents whose hash in `column` lies in low .. high and is that of an earlier one: int64, ascending."""
    hashes, documents, copies = [], [], []
    for segment in segments:
        if not segment.documents:
            continue
        values = np.load(segment.hashes, mmap_mode="r", allow_pickle=False)[column]
        start, stop = np.searchsorted(values, np.uint64(low)), np.searchsorted(values, np.uint64(high), side="right")
        values = np.array(values[start:stop])
        places = np.load(segment.places, mmap_mode="r", allow_pickle=False)[column, start:stop]
        # copies inside a segment are told at once: where most documents are copies, their hashes would be one range
        again = np.append(False, values[1:] == values[:-1])[: len(values)]
        copies.append(places[again].astype(np.int64) + segment.first)
        hashes.append(values[~again])
        documents.append(places[~again].astype(np.int64) + segment.first)
    if not hashes:
        return np.empty(0, np.int64)
    hashes, documents = np.concatenate(hashes), np.concatenate(documents)
    order = np.argsort(hashes, kind="stable")  # earlier documents stay before later ones of the same hash
    again = hashes[order][1:] == hashes[order][:-1]
    found = np.concatenate([*copies, documents[order][1:][again]])
    found.sort()
    return found


def decide(copies: Iterator[tuple[int, np.ndarray]], documents: int) -> np.ndarray:
    """KEPT, EXACT or NEAR for each document, from (column, its later copies): uint8 [documents]."""
    verdicts = np.full(documents, KEPT, np.uint8)
    for column, found in copies:
        if column == 0:
            verdicts[found] = EXACT
        else:
            verdicts[found[verdicts[found] != EXACT]] = NEAR
    return verdicts

"""Mixture: the samples of several sources in given proportions, which may change while a run goes on.

`--data` names a directory that train/prepare.py made, or a JSON file beside such directories that mixes them:

    {"phases": [{"from_sample": 0, "sources": {"zh": 1}},
                {"from_sample": 73242188, "sources": {"zh": 0.6, "maths": 0.2, "code": 0.2}}]}

DIR#NAME is the source that prepare.py was given as NAME=PATH. A directory that was given sources of different weights
is a mixture by itself: each has a share of its weight times its tokens.

A source's weight is its share of the samples, in thousandths. From sample `from_sample` on (step x --batch of a run in
which no samples were left out) a phase holds; a phase can be added to a run as long as it has not come that far. Which
sample of which source a number stands for is a pure function: of each 1,000 samples in a row a source gives its share,
at places that a permutation keyed by (seed, thousand) draws, and its own samples in their own order, over its own
epochs, without a gap from one phase to the next.
"""

import bisect
import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xiangxin_fast.errors import InputError
from xiangxin_fast.strict_files import read_json

from .data import Batch, Samples, TokenDataset, permuted, round_keys
from .shards import Manifest

BLOCK = 1000


@dataclass(frozen=True)
class Phase:
    """From sample `first` on, `shares[source]` of each BLOCK samples come from a source: DIR or DIR#NAME."""

    first: int
    shares: dict[Path, int]


def read_phases(data: Path) -> list[Phase]:
    """The phases that `--data` names: a directory is one phase. InputError on a file that is none."""
    if not data.is_file():
        return [Phase(0, _shares_of_directory(data))]
    content = read_json(data)
    try:
        phases = [
            Phase(phase["from_sample"], _shares({data.parent / k: v for k, v in phase["sources"].items()}))
            for phase in content["phases"]
        ]
        starts = [phase.first for phase in phases]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts or any(type(s) is not int for s in starts):
            raise ValueError(f"expected from_sample 0 first, then ascending whole numbers, got {starts}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{data}: not a mixture (python train/run.py --help shows one): {reason}") from None
    return phases


def _shares_of_directory(directory: Path) -> dict[Path, int]:
    manifest = Manifest.load(directory)
    tokens = Counter()
    for shard in manifest.splits["train"].shards:
        tokens[shard.source] += shard.tokens
    weights = {name: manifest.sources[name].weight for name in tokens}
    if len(set(weights.values())) < 2:
        return {directory: BLOCK}
    try:
        return _shares({directory.with_name(f"{directory.name}#{n}"): w * tokens[n] for n, w in weights.items()})
    except ValueError as error:
        raise InputError(f"{directory}: {error}") from None


def _parted(source: Path) -> tuple[Path, str | None]:
    """Directory and name of a source: DIR#NAME, or DIR."""
    directory, _, name = source.name.partition("#")
    return source.with_name(directory), name or None


def _shares(weights: dict[Path, float]) -> dict[Path, int]:
    """Weights as whole numbers that sum to BLOCK: each rounded down, the largest remainders get what is left."""
    if not weights or any(type(w) not in (int, float) or not 0 < w < float("inf") for w in weights.values()):
        raise ValueError(f"expected weights above 0, got {list(weights.values())}")
    exact = {source: BLOCK * weight / sum(weights.values()) for source, weight in weights.items()}
    shares = {source: int(share) for source, share in exact.items()}
    by_remainder = sorted(exact, key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: BLOCK - sum(shares.values())]:
        shares[source] += 1
    if missing := [source.name for source, share in shares.items() if share == 0]:
        raise ValueError(f"expected weights of at least 1/{BLOCK} of their sum, got less for {missing[0]}")
    return shares


def _sources(phases: list[Phase]) -> list[Path]:
    return list(dict.fromkeys(source for phase in phases for source in phase.shares))


def _open(sources: list[Path], split: str, context: int, seed: int) -> dict[Path, TokenDataset]:
    """Each source's split. InputError where two were not made with one tokenizer."""
    opened = {}
    for source in sources:
        directory, name = _parted(source)
        opened[source] = TokenDataset(directory, split, context, seed, name)
    expected = opened[sources[0]].manifest.tokenizer_sha256
    for source, dataset in opened.items():
        if (found := dataset.manifest.tokenizer_sha256) != expected:
            raise InputError(f"{source}: expected the tokenizer of {sources[0]}, {expected}, got {found}")
    return opened


class Mixture(Samples):
    """The training samples that `--data` names."""

    def __init__(self, data: Path, context: int, seed: int):
        """Raises InputError where the file or a directory is not whole, or tokenizers differ."""
        self.seed = seed
        self._phases = read_phases(data)
        self._sources = _open(_sources(self._phases), "train", context, seed)
        self._firsts = [phase.first for phase in self._phases]
        self._offsets = [dict.fromkeys(self._sources, 0)]  # samples each source has given before each phase
        for number in range(1, len(self._phases)):
            self._offsets.append(self._given(number - 1, self._firsts[number]))

    def __len__(self) -> int:
        return sum(len(source) for source in self._sources.values())

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer of all sources is."""
        return _parted(next(iter(self._sources)))[0]

    def locate(self, index: int) -> tuple[Path, int]:
        """Source and number in it of global sample `index`."""
        number = bisect.bisect_right(self._firsts, index) - 1
        phase = self._phases[number]
        block, place = divmod(index - phase.first, BLOCK)
        drawn, before = self._block(number, block)
        source = list(phase.shares)[drawn[place]]
        return source, self._offsets[number][source] + block * phase.shares[source] + int(before[place])

    def sample(self, index: int) -> Batch:
        source, number = self.locate(index)
        return self._sources[source].sample(number)

    def epochs(self, index: int) -> dict[str, float]:
        """How often each source has been seen through by sample `index`, by its directory's name."""
        given = self._given(bisect.bisect_right(self._firsts, index) - 1, index)
        return {source.name: given[source] / len(dataset) for source, dataset in self._sources.items()}

    def description(self) -> list[dict]:
        """What decides the order, phase by phase: the shares of the sources by the sha256 of their manifests."""
        known = {}
        for source in self._sources:
            directory, name = _parted(source)
            sha256 = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
            known[source] = f"{sha256}#{name}" if name else sha256
        return [
            {"from_sample": phase.first, "sources": [[known[s], share] for s, share in phase.shares.items()]}
            for phase in self._phases
        ]

    def _given(self, number: int, index: int) -> dict[Path, int]:
        """Samples of each source among the first `index`, which ends in (or at the end of) phase `number`."""
        phase = self._phases[number]
        given = dict(self._offsets[number])
        block, place = divmod(index - phase.first, BLOCK)
        drawn, _ = self._block(number, block)
        for position, (source, share) in enumerate(phase.shares.items()):
            given[source] += block * share + int((drawn[:place] == position).sum())
        return given

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a run has one mixture, which lives as long
    def _block(self, number: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a block: which source of the phase it draws, and how often the block did so before."""
        shares = list(self._phases[number].shares.values())
        bounds = np.cumsum(shares)
        keys = round_keys(self.seed, f"block {block} of phase {number}")
        places = range(BLOCK) if len(shares) == 1 else [permuted(place, BLOCK, keys) for place in range(BLOCK)]
        drawn = np.searchsorted(bounds, places, side="right")
        before = np.zeros(BLOCK, np.int64)
        for position in range(len(shares)):
            mine = drawn == position
            before[mine] = np.arange(mine.sum())
        return drawn, before


def same_past(written: list[dict], mine: list[dict], sample: int) -> bool:
    """Whether two descriptions give the same samples before `sample`."""
    return [p for p in written if p["from_sample"] < sample] == [p for p in mine if p["from_sample"] < sample]


class HeldOut(Samples):
    """The validation samples of all directories that `--data` names, in turn, as far as the shortest goes."""

    def __init__(self, data: Path, context: int, seed: int):
        directories = list(dict.fromkeys(_parted(source)[0] for source in _sources(read_phases(data))))
        self._sources = list(_open(directories, "validation", context, seed).values())

    def __len__(self) -> int:
        return len(self._sources) * min(len(source) for source in self._sources)

    def sample(self, index: int) -> Batch:
        number, source = divmod(index, len(self._sources))
        return self._sources[source].sample(number)

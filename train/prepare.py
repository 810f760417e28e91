"""Raw text to token shards for train/run.py: read, clean, deduplicate, decontaminate, tokenize.

    python train/prepare.py corpus/ --vocab 51200 --out data
    python train/prepare.py wudao=w/*.json cci:2=cci/ --tokenizer phi-2 --benchmarks ceval cmmlu --out data
    python train/prepare.py verify data
    python train/prepare.py stats data
    python train/prepare.py tokenizer corpus/ --out tok --compare phi-2

Inputs are .txt (documents separated by blank lines), .jsonl, .json (arrays) and .parquet files, the first three also as
.gz or .zst, directories of them and patterns. NAME=PATH or NAME:WEIGHT=PATH names a source: it gets shards of its own,
and training draws each of its tokens WEIGHT times as often. UTF-8 and GB18030 are told apart for each file.

A run that was interrupted or killed goes on with the same command, and gives the same bytes as one that was not; so
does any number of workers. What became of the records stands in report.json, rejects.jsonl and benchmarks.jsonl beside
the shards. How each stage decides is written at the top of its file in train/corpus/.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: Python has put train/ first, whose modules would hide others of the same name
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from train.corpus.clean import Options
from train.corpus.files import Source, cut_into_units, list_files, merge_sources, parse_source
from train.corpus.pipeline import Job, prepare
from train.corpus.sample import SAMPLE_BYTES, sample_unit, thinned
from train.corpus.workers import console, progress, run
from train.shards import MAX_MANIFEST_BYTES, SPLITS, Manifest, Shard
from xiangxin_fast.config import PRESETS
from xiangxin_fast.errors import InputError, exits_cleanly, one_line_complaints
from xiangxin_fast.strict_files import read_json
from xiangxin_fast.tokenizer import Tokenizer

Inputs = tyro.conf.Positional[list[str]]
Directory = tyro.conf.Positional[Path]
TRAIN, VALIDATION = SPLITS
HELD_OUT = "held-out"  # the source of --holdout-files


def shards(
    inputs: Inputs,
    /,
    out: Path,
    tokenizer: Path | None = None,
    vocab: int | None = None,
    text_key: str | None = None,
    titles: bool = True,
    normalize: bool = True,
    filters: bool = True,
    exact_duplicates: bool = True,
    near_duplicates: bool = True,
    benchmarks: tuple[Path, ...] = (),
    holdout: float = 0.005,
    holdout_files: tuple[Path, ...] = (),
    workers: int | None = None,
) -> None:
    """Write token shards (this is what happens where no command is named).

    Args:
        inputs: files, directories and patterns; NAME=PATH or NAME:WEIGHT=PATH for several sources
        out: directory to make: new or empty, and outside of the inputs
        tokenizer: directory of the tokenizer to use; or give --vocab
        vocab: learn a byte-level BPE of this many tokens on an even sample of the clean text
        text_key: key of the text in JSON records and parquet files; found by itself where it has one of the usual names
        titles: put a record's title before its text
        normalize: NFC, line ends, no zero-width or control characters
        filters: leave out documents that are short, not Chinese, repetitive, mis-decoded or mostly of a page's frame
        exact_duplicates: of equal documents keep the first
        near_duplicates: of similar documents, equal ones among them, keep the first (MinHash)
        benchmarks: files or directories of benchmarks; documents that hold one of their items are left out
        holdout: fraction of the documents that becomes the validation split
        holdout_files: files or directories that are the validation split, instead of a fraction
        workers: processes; by default one for each CPU
    """
    if (tokenizer is None) == (vocab is None):
        raise InputError("expected either --tokenizer DIR or --vocab N")
    _check_holdout(holdout)
    if vocab is not None:
        Tokenizer.check_vocab(vocab)
    sources = _sources(inputs)
    out = Path(out)
    if holdout_files and any(source.name == HELD_OUT for source in sources):
        raise InputError(f"expected another name than {HELD_OUT!r} for a source: it is that of --holdout-files")
    if holdout_files:  # first, so that copies of held-out text are dropped from the training text and not the reverse
        sources = [Source(HELD_OUT, 1.0, tuple(map(str, holdout_files)), VALIDATION), *sources]
        sources[1:] = [Source(source.name, source.weight, source.paths, TRAIN) for source in sources[1:]]
    options = Options(
        text_key=text_key,
        titles=titles,
        normalize=normalize,
        filter=filters,
        exact=exact_duplicates,
        near=near_duplicates,
        benchmarks=tuple(map(str, benchmarks)),
        holdout=holdout,
    )
    manifest = prepare(Job(tuple(sources), options, tokenizer and str(tokenizer), vocab, out, _count(workers)))
    stats(out)
    if not manifest.splits[VALIDATION].tokens:
        console.print("[yellow]the validation split is empty[/]: give a larger --holdout, or --holdout-files")


def tokenizer(
    inputs: Inputs,
    /,
    out: Path,
    vocab: int = PRESETS["xiangxin-3b"].vocab,
    text_key: str | None = None,
    titles: bool = True,
    normalize: bool = True,
    holdout: float = 0.005,
    compare: tuple[Path, ...] = (),
    workers: int | None = None,
) -> None:
    """Learn a byte-level BPE tokenizer from an even sample of the text, and measure it on held-out text.

    The default vocabulary is what Phi-2's embedding has rows for. On Chinese, Phi-2's own tokenizer takes about 2.2
    tokens a character; give its directory to --compare to see it on the same text.

    Args:
        inputs: files, directories and patterns
        out: directory to write tokenizer.json, tokenizer_config.json and special_tokens_map.json to
        vocab: tokens, with the 256 bytes and end-of-text
        text_key: key of the text in JSON records and parquet files
        titles: put a record's title before its text
        normalize: NFC, line ends, no zero-width or control characters
        holdout: fraction of the documents that is not learned from but measured with
        compare: directories of other tokenizers to measure beside it
        workers: processes; by default one for each CPU
    """
    _check_holdout(holdout)
    Tokenizer.check_vocab(vocab)
    others = {str(path): Tokenizer.load(path) for path in compare}
    units = cut_into_units(list_files(_sources(inputs), console.print))
    total = sum(unit.bytes for unit in units)
    options = Options(text_key=text_key, titles=titles, normalize=normalize, holdout=holdout)
    tasks = [(unit, options, SAMPLE_BYTES / max(total, 1)) for unit in units]
    with tempfile.TemporaryDirectory() as directory:
        sampled = run("sample", sample_unit, tasks, total, 0, _count(workers), Path(directory))
    learned, held_out = (thinned([text for parts in sampled for text in parts[i]], SAMPLE_BYTES) for i in (0, 1))
    if not learned:
        raise InputError(f"expected text in {inputs[0]} and what follows it, found no usable record")
    console.print(f"learning {vocab:,} tokens from {sum(map(len, learned)):,} characters")
    with warnings.catch_warnings(record=True) as fewer:
        warnings.simplefilter("always")
        trained = Tokenizer.train(learned, vocab)
    for warning in fewer:
        console.print(f"[yellow]{warning.message}[/]")
    trained.save(out)
    print(f"{len(trained):,} tokens in {out}")
    characters = sum(map(len, held_out))
    if not characters:
        print("held-out text: none; a larger --holdout would have some")
        return
    print(f"held-out text, {characters:,} characters:")
    for name, measured in ({str(out): trained} | others).items():
        count = sum(map(len, measured.encode_batch(held_out)))
        size = sum(len(text.encode()) for text in held_out)
        print(f"  {name}: {count / characters:.3f} tokens per character, {size / count:.3f} bytes per token")


def verify(directory: Directory, /) -> None:
    """Check every byte of a prepared directory: checksums, token ranges, document index, tokenizer.

    Args:
        directory: made by prepare.py
    """
    manifest = Manifest.load(directory)
    if (eos := Tokenizer.load(directory / "tokenizer.json").eos_id) != manifest.eos_id:
        raise InputError(f"{directory}: expected the tokenizer's end-of-text to be {manifest.eos_id}, got {eos}")
    records = {split: manifest.splits[split].shards for split in SPLITS}
    total = sum(record.bytes for split in SPLITS for record in records[split])
    with progress() as bar:
        task = bar.add_task("verify", total=total)
        for split in SPLITS:
            for number, record in enumerate(records[split]):
                Shard(directory, manifest, split, number).check()
                bar.advance(task, record.bytes)
    print(f"{directory}: {sum(map(len, records.values()))} shards, {total:,} bytes, all as written")


def stats(directory: Directory, /) -> None:
    """Tell tokens, documents, their lengths and what was left out of a prepared directory, by source.

    Args:
        directory: made by prepare.py
    """
    manifest = Manifest.load(directory)
    table = Table("source", "split", *("weight", "documents", "tokens", "characters per token", "bytes per token"))
    lengths = Table("source", "split", "tokens in a document", "documents")
    for split in SPLITS:
        for name, source in manifest.sources.items():
            own = [n for n, shard in enumerate(manifest.splits[split].shards) if shard.source == name]
            if not own:
                continue
            records = [manifest.splits[split].shards[n] for n in own]
            documents, tokens = (sum(getattr(r, field) for r in records) for field in ("documents", "tokens"))
            ratios = [sizes.get(split, 0) / max(tokens, 1) for sizes in (source.characters, source.text_bytes)]
            figures = (f"{source.weight:g}", f"{documents:,}", f"{tokens:,}", *(f"{ratio:.3f}" for ratio in ratios))
            table.add_row(name, split, *figures)
            counts = _lengths(directory, manifest, split, own)
            for power in np.flatnonzero(counts):
                span = f"{1 << power - 1:,} to {(1 << power) - 1:,}"
                lengths.add_row(name, split, span, f"{counts[power]:,}")
    for one in (table, lengths):
        for column in one.columns:
            column.overflow = "fold"  # nothing is left out, however narrow the terminal
        Console().print(one)
    _tell_report(directory / "report.json")


def _tell_report(file: Path) -> None:
    if not file.exists():
        return
    lines = []
    try:
        for name, source in read_json(file, MAX_MANIFEST_BYTES)["sources"].items():
            records, files, kept = source["records"], source["files"], source["kept"]["documents"]
            lines.append(f"{name}: {records:,} records in {files:,} files, {kept:,} kept")
            for stage, reasons in {"rejected": source["rejected"], **source["dropped"]}.items():
                lines += [f"  {stage}: {entry['documents']:,} {reason}" for reason, entry in reasons.items()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: expected the report of prepare.py, got {type(error).__name__}: {error}") from None
    print("\n".join(lines))


def _lengths(directory: Path, manifest: Manifest, split: str, numbers: list[int]) -> np.ndarray:
    """Entry k: documents of 2^(k-1) .. 2^k - 1 tokens, end-of-text included."""
    counts = np.zeros(64, np.int64)
    for number in numbers:
        shard = Shard(directory, manifest, split, number)
        lengths = np.diff(shard.starts().astype(np.int64), append=shard.tokens)
        counts += np.bincount(np.frexp(lengths)[1], minlength=64)
    return counts


def _sources(inputs: Sequence[str | Path]) -> list[Source]:
    if not inputs:
        raise InputError("expected at least one file, directory or pattern of text")
    return merge_sources([parse_source(str(argument)) for argument in inputs])


def _check_holdout(holdout: float) -> None:
    if not 0 <= holdout < 1:
        raise InputError(f"expected --holdout in 0 .. 1, got {holdout}")


def _count(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise InputError(f"expected --workers of 1 or more, got {workers}")
    return workers or len(os.sched_getaffinity(0))


def _later(function: Callable) -> Callable:
    """`function`, put off until parsing is over: complaints about the command line are told apart from its own."""

    @functools.wraps(function)
    def call(*arguments, **options):
        return functools.partial(function, *arguments, **options)

    return call


@exits_cleanly
def main() -> None:
    commands = {function.__name__: _later(function) for function in (shards, tokenizer, verify, stats)}
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in (*commands, "-h", "--help"):
        arguments = ["shards", *arguments]
    with one_line_complaints():
        command = tyro.extras.subcommand_cli_from_dict(
            commands, prog="train/prepare.py", description=__doc__, args=arguments
        )
    try:
        command()
    except OSError as error:
        raise InputError(f"{error.filename or 'output'}: {error.strerror}") from error
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    main()

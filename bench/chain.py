"""The chain on a CPU: writing token shards beside tokenizers' own batch encoding, and what the demo reached."""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer as HFTokenizer

from train import demo
from train.config import PRESETS, TrainConfig
from train.corpus import Corpus, Document
from train.data import TokenDataset
from train.loop import evaluate
from train.metrics import read_metrics
from train.prepare import TRAIN, write_shards
from xiangxin_fast.checkpoint import load_pretrained
from xiangxin_fast.errors import InputError, exits_cleanly
from xiangxin_fast.tokenizer import Tokenizer

from .measure import environment, interleaved

RESULTS = Path(__file__).resolve().parent / "results"
CPU = torch.device("cpu")


def bench_prepare(text: Path, tokenizer_file: Path, seconds: float) -> dict:
    """Milliseconds of `prepare.py shards` from the file on, and of tokenizers on the same documents, already read."""
    documents = [item.text for item in Corpus([text]) if isinstance(item, Document)]
    tokenizer, peer = Tokenizer.load(tokenizer_file), HFTokenizer.from_file(str(tokenizer_file))

    with tempfile.TemporaryDirectory() as directory:

        def ours(start) -> None:
            out = Path(tempfile.mkdtemp(dir=directory))
            tokenizer.save(out)
            start()
            write_shards([(Corpus([text]), lambda content: TRAIN)], tokenizer, out)

        def encode_batch(start) -> None:
            start()
            peer.encode_batch(documents, add_special_tokens=False)

        def encode_batch_fast(start) -> None:
            start()
            peer.encode_batch_fast(documents, add_special_tokens=False)

        turns = {"prepare": ours, "encode_batch": encode_batch, "encode_batch_fast": encode_batch_fast}
        timings, failed = interleaved(turns, CPU, seconds, flush=False)
    if failed:
        raise RuntimeError(f"prepare: {failed}")
    fastest = min(timings["encode_batch"].median, timings["encode_batch_fast"].median)
    return {
        "text_bytes": text.stat().st_size,
        "documents": len(documents),
        "ms": {name: vars(timing) for name, timing in timings.items()},
        "prepare_over_encode_batch": timings["prepare"].median / timings["encode_batch"].median,
        "prepare_over_fastest": timings["prepare"].median / fastest,
    }


def bench_demo(home: Path) -> dict:
    """Losses of a finished demo on its held-out chapters, measured again from what it exported, in nats per token."""
    config = TrainConfig("demo", home / "shards", home / "run", **PRESETS["demo"])
    directory = config.out / "model"
    if not directory.exists():
        raise InputError(f"{directory}: expected a finished demo; run make demo first")
    model = load_pretrained(directory, "cpu", torch.float32)
    training, held_out = (
        TokenDataset(config.data, split, config.context, config.seed) for split in ("train", "validation")
    )
    steps = [record for record in read_metrics(config.out) if "step" in record]
    return {
        "parameters": model.config.parameters,
        "steps": steps[-1]["step"],
        "minutes": config.minutes,
        "held_out_tokens": len(held_out) * config.context,
        "unigram_loss": demo.unigram_loss(training, held_out),
        "validation_loss": float(evaluate(model, held_out, replace(config, validation_samples=len(held_out)))),
    }


@exits_cleanly
def main(what: str, arguments: list[str]) -> None:
    """Runs `prepare` or `demo` and writes bench/results/cpu-<what>.json."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {what}")
    parser.add_argument("--demo", type=Path, default=demo.HOME, help="directory of a finished demo")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing (default 60)")
    parser.add_argument("--out", type=Path, default=RESULTS / f"cpu-{what}.json")
    options = parser.parse_args(arguments)
    if what == "demo":
        results = bench_demo(options.demo)
    else:
        text, tokenizer = options.demo / "text" / "train.txt", options.demo / "shards" / "tokenizer.json"
        for path in (text, tokenizer):
            if not path.exists():
                raise InputError(f"{path}: expected a finished demo; run make demo first")
        results = bench_prepare(text, tokenizer, options.seconds)
    record = {"environment": environment(CPU), "results": [results]}
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    print(f"written: {options.out}")

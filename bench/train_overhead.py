"""What the training loop takes beside forward, backward and optimizer: python -m bench train-overhead, on a CPU."""

import argparse
import json
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from train.config import PRESETS, TrainConfig
from train.loop import train
from train.metrics import read_metrics
from train.shards import SPLITS, Manifest, ShardWriter, Split
from xiangxin_fast.errors import exits_cleanly
from xiangxin_fast.tokenizer import Tokenizer

from .measure import environment

RESULTS = Path(__file__).resolve().parent / "results"
WARM = 5  # steps left out: caches fill, threads start


def random_shards(directory: Path, tokens: int) -> None:
    """A data directory of random documents."""
    tokenizer = Tokenizer.train(["天地玄黄宇宙洪荒" * 8], 270)
    tokenizer.save(directory)
    draw, splits = random.Random(0), {}
    for split in SPLITS:
        writer = ShardWriter(directory, split, len(tokenizer), tokenizer.eos_id, tokenizer.sha256)
        for _ in range(tokens // 200):
            writer.add([draw.randrange(len(tokenizer)) for _ in range(200)])
        splits[split] = Split(writer.close(), tokens, tokens)
    Manifest(len(tokenizer), tokenizer.eos_id, tokenizer.sha256, splits, {}).save(directory)


def measure(steps: int) -> dict:
    """A run of the demo's shape, all sinks open; milliseconds of a step's parts, and the overhead as a share of all."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        data.mkdir()
        random_shards(data, tokens=100_000)
        config = TrainConfig("demo", data, Path(scratch) / "run", **PRESETS["demo"])
        train(replace(config, steps=steps, minutes=None, validate_every=steps, validation_samples=2, save_every=steps))
        records = [r for r in read_metrics(config.out) if "loss" in r][WARM:]
    parts = ("step", "data", "forward_backward", "optimizer", "other")
    total = {part: sum(record[f"{part}_seconds"] for record in records) for part in parts}
    median = {part: statistics.median(record[f"{part}_seconds"] for record in records) * 1000 for part in parts}
    return {
        "steps": len(records),
        "median_ms": median,
        "overhead": (total["step"] - total["forward_backward"] - total["optimizer"]) / total["step"],
    }


@exits_cleanly
def main(arguments: list[str]) -> None:
    """Measures, prints and writes bench/results/cpu-train-overhead.json."""
    parser = argparse.ArgumentParser(prog="python -m bench train-overhead", description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-train-overhead.json")
    options = parser.parse_args(arguments)
    results = measure(options.steps)
    record = {"environment": environment(torch.device("cpu")), "results": [results]}
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    print(f"written: {options.out}")

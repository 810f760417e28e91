"""What the demo reached."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from train import demo
from train.config import PRESETS, TrainConfig
from train.data import TokenDataset
from train.loop import evaluate
from train.metrics import read_metrics
from xiangxin_fast.checkpoint import load_pretrained
from xiangxin_fast.errors import InputError, exits_cleanly

from .measure import environment

RESULTS = Path(__file__).resolve().parent / "results"
CPU = torch.device("cpu")


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
def main(arguments: list[str]) -> None:
    """Writes bench/results/cpu-demo.json."""
    parser = argparse.ArgumentParser(prog="python -m bench demo")
    parser.add_argument("--demo", type=Path, default=demo.HOME, help="directory of a finished demo")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-demo.json")
    options = parser.parse_args(arguments)
    results = bench_demo(options.demo)
    record = {"environment": environment(CPU), "results": [results]}
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    print(f"written: {options.out}")

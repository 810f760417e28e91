"""A model, a text and a configuration small enough to train in a second."""

import json
import os
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from train.config import TrainConfig
from train.data import IGNORED
from train.metrics import read_metrics
from train.prepare import shards
from xiangxin_fast import save_pretrained
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.model import Phi

ROOT = Path(__file__).resolve().parents[1]
SHAPE = PhiConfig(vocab=320, channels=32, layers=2, heads=2, rotary_dim=8, mlp_hidden=64, context=64, eos_id=0)
WORDS = ("天下大势", "分久必合", "玄德", "关公", "张飞", "曰：", "，", "。", "军马", "一日", "却说")
# Reductions on a CPU change their last bits with the number of threads: processes that are compared have one.
ONE_THREAD = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}


def make_text(documents: int, seed: int) -> str:
    """Documents of about 60 tokens, separated by blank lines."""
    choice = random.Random(seed).choice
    return "\n\n".join("".join(choice(WORDS) for _ in range(80)) for _ in range(documents)) + "\n"


def make_place(directory: Path) -> Path:
    """A directory with shards/ (tokenizer of 300) and hf/: a model directory of SHAPE with random weights."""
    (directory / "train.txt").write_text(make_text(40, seed=1), encoding="utf-8")
    (directory / "validation.txt").write_text(make_text(6, seed=2), encoding="utf-8")
    held_out = (directory / "validation.txt",)
    shards([directory / "train.txt"], out=directory / "shards", vocab=300, holdout_files=held_out)
    save_pretrained(Phi(SHAPE).init_weights(3), directory / "hf")
    return directory


def config_of(place: Path, out: Path, **changes) -> TrainConfig:
    """Twenty steps of four sequences in two micro-batches, a checkpoint every five."""
    settings = {
        "context": 32, "batch": 4, "micro_batch": 2, "steps": 20, "lr": 1e-2, "warmup": 0.1, "validate_every": 10,
        "validation_samples": 4, "save_every": 5, "init_from": place / "hf",
    }  # fmt: skip
    return TrainConfig("demo", place / "shards", out, **settings | changes)


def random_batch(vocab: int, rows: int, context: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, targets of which row r has only (r + 1)/rows valid, and two documents per row."""
    generator = np.random.default_rng(seed)
    tokens, targets = generator.integers(0, vocab, (2, rows, context))
    for row in range(rows):
        targets[row, context * (row + 1) // rows :] = IGNORED
    segment_ids = (np.arange(context) >= generator.integers(1, context, (rows, 1))).astype(np.int32)
    return tokens, targets, segment_ids


def command_of(config: TrainConfig) -> list[str]:
    """The options of train/run.py that give `config`."""
    options = []
    for name, value in config.to_json().items():
        if value is None:
            continue
        flag = "--" + name.replace("_", "-")
        options += (
            [flag.replace("--", "--" if value else "--no-", 1)] if isinstance(value, bool) else [flag, str(value)]
        )
    return options


def weights_of(config: TrainConfig, step: int) -> dict[str, bytes]:
    """The bytes of a checkpoint's tensors, by name; those of several ranks' parts, one after another."""
    parts = defaultdict(list)
    for file in sorted((config.out / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            parts[name].append(tensor.numpy().tobytes())
    return {name: b"".join(part) for name, part in parts.items()}


def losses_of(config: TrainConfig) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm of every step, to the last bit."""
    records = [record for record in read_metrics(config.out) if "loss" in record]
    return [(record["step"], record["loss"].hex(), record["grad_norm"].hex()) for record in records]


def events_of(config: TrainConfig, kind: str) -> list[dict]:
    """The events of one kind, as events.jsonl has them."""
    events = map(json.loads, (config.out / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [event for event in events if event["event"] == kind]

"""The command line in this process: a tiny model directory for it, and what a call gives.

As a program, the command line with tokens that are announced, and so slow that a test can press Ctrl-C between them.
"""

import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.hf import random_model
from xiangxin_fast import generate
from xiangxin_fast.checkpoint import save_pretrained
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.generator import Stream
from xiangxin_fast.tokenizer import Tokenizer

TEXTS = ["年轻人不应该再努力了，年轻人就应该享受生活。" * 3, "the quick brown fox " * 5]
STEP = "a step begins"
CONFIG = PhiConfig(vocab=320, channels=160, layers=2, heads=2, rotary_dim=32, mlp_hidden=320, context=64)


def write_model(directory: Path, config: PhiConfig = CONFIG, vocab: int = 300) -> Path:
    """A model directory with a tokenizer of at most `vocab` ids, fewer than the model's; it never ends a text."""
    model, tokenizer = random_model(config), Tokenizer.train(TEXTS, vocab)
    with torch.no_grad():
        model.head_b[tokenizer.eos_id] = -1000
    save_pretrained(model, directory, tokenizer)
    return directory


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run(capsys, directory: Path | None, *arguments: str, stdin: bytes = b"") -> Outcome:
    """Runs the command line in fp32 on the CPU, with `stdin` in a pipe."""
    given = () if directory is None else ("--model", str(directory))
    kept, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
    capsys.readouterr()
    try:
        generate.main([*given, "--dtype", "float32", "--device", "cpu", *arguments])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdin = kept
    return Outcome(code, *capsys.readouterr())


if __name__ == "__main__":
    next_step = Stream.__next__

    def slow_step(stream: Stream):
        print(STEP, file=sys.stderr, flush=True)
        time.sleep(0.05)
        return next_step(stream)

    Stream.__next__ = slow_step
    generate.main()

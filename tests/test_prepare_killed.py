"""prepare.py, killed: the bytes are those of a run left alone, whatever the moment and the number of workers."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.corpus import write_corpus
from tests.test_prepare import ROOT, article, bytes_of, directory_in_memory, write_jsonl
from train.shards import Manifest
from xiangxin_fast.tokenizer import Tokenizer

# Forks one run after the other, each of which dies at one of its first changes of the output's files and directories,
# a file it was to write left empty, until one has so few left that it ends. Forked, because importing takes longer.
AT_A_CHANGE = """
import os, random, signal
from pathlib import Path
from train import prepare
from train.corpus import files, tokens
files.MIN_UNIT_BYTES = files.MAX_UNIT_BYTES = 1 << 12
tokens.MIN_SHARD_BYTES = tokens.MAX_SHARD_BYTES = 1 << 13
def run(out, limit):
    left = limit
    def audit(event, arguments):
        nonlocal left
        write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and out in str(arguments[0])
        if write or event in ("os.remove", "os.rmdir") or (event == "os.rename" and out in str(arguments[1])):
            left -= 1
            if left == 0:
                if write:
                    os.open(*arguments[::2])
                os.kill(os.getpid(), signal.SIGKILL)
    if (child := os.fork()) == 0:
        os.sys.addaudithook(audit)
        arguments = {"tokenizer": None, "vocab": 300, "benchmarks": (Path("gsm8k.jsonl"),), "holdout": 0.1}
        prepare.shards([Path("a.jsonl")], out=Path(out), workers=1, **arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
rng, deaths = random.Random(1), 0
assert run("straight", -1) == 0
while (code := run("killed", rng.randint(12, 18))) == -signal.SIGKILL and deaths < 100:
    deaths += 1
print(code, deaths)
"""


@pytest.fixture
def in_memory(tmp_path) -> Iterator[Path]:
    with directory_in_memory(tmp_path) as directory:
        yield directory


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def assert_same(straight: Path, killed: Path) -> None:
    expected, found = bytes_of(straight), bytes_of(killed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def test_killed_at_changes_of_any_file_the_bytes_are_the_same(in_memory):
    rng = random.Random(3)
    texts = [article(seed, 120) for seed in range(40)]
    texts += [*rng.choices(texts, k=6), *(text[:50] + "新" + text[50:] for text in texts[:6]), "短"]
    write_jsonl(in_memory / "a.jsonl", [*({"text": text} for text in texts), b"{"])
    (in_memory / "gsm8k.jsonl").write_text(json.dumps({"question": texts[3][:60], "answer": "1"}) + "\n")
    command = [sys.executable, "-c", AT_A_CHANGE]
    done = subprocess.run(command, cwd=in_memory, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, deaths = map(int, done.stdout.split()[-2:])
    assert code == 0, "killed again and again it never ends" if code == -signal.SIGKILL else done.stderr
    assert deaths >= 20
    assert len(Manifest.load(in_memory / "straight").splits["train"].shards) >= 2
    assert_same(in_memory / "straight", in_memory / "killed")


KILLS = 5
# Run as a file, so that its worker processes have the hook too. Once there are so many results, whoever is about to
# name the next one waits a moment and kills the main process and itself; the other worker is wherever it is then.
AT_A_RESULT = """
import os, random, sys, time
from pathlib import Path
corpus, out, tokenizer, workers, limit = sys.argv[1:]
main = int(os.environ.setdefault("MAIN", str(os.getpid())))
results = 0
def audit(event, arguments):
    global results
    if event != "os.rename" or not str(arguments[1]).startswith(out):
        return
    results = sum(suffix in (".json", ".npy", ".bin") for suffix in (file.suffix for file in Path(out).rglob("*")))
    if results >= int(limit) >= 0:
        time.sleep(random.Random(limit).uniform(0, 0.1))
        os.kill(main, 9)
        os.kill(os.getpid(), 9)
sys.addaudithook(audit)
if __name__ == "__main__":  # workers import what they need; nobody the command line, which takes its time
    from train.corpus import clean, files, pipeline, tokens
    tokens.MIN_SHARD_BYTES = 1 << 20
    sources = (files.Source("corpus", 1.0, (f"{corpus}/corpus",)),)
    options = clean.Options(benchmarks=(f"{corpus}/benchmark",))
    pipeline.prepare(pipeline.Job(sources, options, tokenizer, None, Path(out), int(workers)))
    print(results)
"""


def same_after_kills(directory: Path, megabytes: float) -> None:
    """One process, left alone, and two with five kills of a sixth of the results each."""
    write_corpus(directory / "made", megabytes, copies=0.75)
    Tokenizer.train([article(seed, 400) for seed in range(20)], 300).save(directory / "tokenizer")
    (directory / "run.py").write_text(AT_A_RESULT)

    def run(out: str, workers: int, limit: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "run.py", "made", out, "tokenizer", str(workers), str(limit)]
        return subprocess.run(command, cwd=directory, env=environment(), capture_output=True, text=True)

    straight = run("straight", 1, -1)
    assert straight.returncode == 0, straight.stderr
    results = int(straight.stdout.split()[-1])
    for kill in range(1, KILLS + 1):
        killed = run("killed", 2, kill * results // (KILLS + 1))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (directory / "killed" / "manifest.json").exists()
    last = run("killed", 2, -1)
    assert last.returncode == 0, last.stderr
    assert_same(directory / "straight", directory / "killed")


def test_20_mb_with_one_process_and_with_two_killed_five_times(in_memory):
    same_after_kills(in_memory, 20)


@pytest.mark.slow
def test_100_mb_with_one_process_and_with_two_killed_five_times(tmp_path):
    same_after_kills(tmp_path, 100)

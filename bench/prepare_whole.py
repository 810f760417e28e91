"""Runs of train/prepare.py over one made-up corpus, watched from outside: time by step, memory of their processes.

One with a process, one with all CPUs, and one that is killed five times: their manifests, which have the sha256 of all
that is in the shards, must be the same.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from train.shards import SPLITS, Manifest
from xiangxin_fast.tokenizer import Tokenizer

from .corpus import write_corpus

ROOT = Path(__file__).resolve().parents[1]
PREPARE = ROOT / "train" / "prepare.py"
SAMPLE_SECONDS = 0.25
KILLS = 5


def run_whole(megabytes: float, workers: int, vocab: int, home: Path | None) -> dict:
    """Makes a corpus under `home` (default: the system's temporary directory), prepares it and verifies the result.

    Raises RuntimeError where the bytes depend on the number of processes or on having been killed.
    """
    with tempfile.TemporaryDirectory(dir=home) as place:
        directory = Path(place)
        planted = write_corpus(directory, megabytes)
        straight = {count: _run(directory, f"out-{count}", count, vocab) for count in sorted({1, workers})}
        limit = straight[workers]["seconds"] / (KILLS + 1)
        for _ in range(KILLS):
            _run(directory, "killed", workers, vocab, limit)
        killed = _run(directory, "killed", workers, vocab)
        digests = {killed["manifest_sha256"], *(run.pop("manifest_sha256") for run in straight.values())}
        if len(digests) > 1:
            raise RuntimeError(f"prepare: expected one manifest from all runs, got sha256 {', '.join(sorted(digests))}")
        out = directory / f"out-{workers}"
        subprocess.run([sys.executable, str(PREPARE), "verify", str(out)], check=True, stdout=subprocess.DEVNULL)
        manifest = Manifest.load(out)
        report = json.loads((out / "report.json").read_bytes())["sources"]["corpus"]
        inputs = sum(file.stat().st_size for file in (directory / "corpus").iterdir())
    dropped = {"rejected": report["rejected"], **report["dropped"]}
    return {
        "megabytes": megabytes,
        "input_bytes": inputs,
        "vocab": manifest.vocab,
        "workers": straight,
        "killed": {"times": KILLS, "each_after_seconds": limit},
        "manifest_sha256": digests.pop(),
        "planted": planted,
        "records": report["records"],
        "kept": report["kept"],
        "dropped": {
            stage: {reason: entry["documents"] for reason, entry in reasons.items()}
            for stage, reasons in dropped.items()
        },
        "tokens": {split: manifest.splits[split].tokens for split in SPLITS},
    }


def _run(directory: Path, name: str, workers: int, vocab: int, limit: float | None = None) -> dict:
    """One run into `name`, killed with SIGKILL after `limit` seconds; its time, memory and manifest's sha256."""
    out = directory / name
    command = [sys.executable, str(PREPARE), str(directory / "corpus"), "--out", str(out), "--vocab", str(vocab)]
    command += ["--benchmarks", str(directory / "benchmark"), "--workers", str(workers)]
    start = time.monotonic()
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        watch = _Watch(process.pid, out)
        watch.start()
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()  # its workers notice, and the next run waits for them
            code = process.wait()
    seconds = time.monotonic() - start
    watch.join()
    if code != (0 if limit is None else -signal.SIGKILL):
        raise RuntimeError(f"prepare: exit code {code}: {(directory / 'log').read_text()[-2000:]}")
    if limit is not None:
        return {}
    return {
        "seconds": seconds,
        "seconds_by_step": watch.seconds,
        "peak_bytes": watch.peak,
        "peak_bytes_by_step": watch.peaks,
        "manifest_sha256": hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest(),
    }


def start_only(advance: Callable[[int], None], tokenizer_dir: str) -> None:
    """A task of train.corpus.workers.run that does nothing but what every process does first."""
    Tokenizer.load(tokenizer_dir)


class _Watch(threading.Thread):
    """Samples the proportional memory of a process and all its descendants, and which step it has come to."""

    def __init__(self, pid: int, out: Path):
        super().__init__(daemon=True)
        self._pid, self._work = pid, out / "work"
        self.peak, self.peaks, self.seconds = 0, {}, {}

    def run(self) -> None:
        before = time.monotonic()
        while Path(f"/proc/{self._pid}/smaps_rollup").exists() and (memory := _memory_of_tree(self._pid)):
            step = self._step()
            self.peak = max(self.peak, memory)
            self.peaks[step] = max(self.peaks.get(step, 0), memory)
            now = time.monotonic()
            self.seconds[step] = self.seconds.get(step, 0.0) + now - before
            before = now
            time.sleep(SAMPLE_SECONDS)

    def _step(self) -> str:
        if any(self._work.glob("train-*.json")) or (self._work.parent / "tokenizer.json").exists():
            return "tokenize"
        if (self._work / "verdicts.npy").exists():
            return "learn tokens"
        return "duplicates" if any((self._work / "copies").glob("*.npy")) else "clean"


def _memory_of_tree(pid: int) -> int:
    """Proportional set size (a shared page is divided among who shares it) in bytes."""
    total, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) << 10
            for task in os.listdir(f"/proc/{process}/task"):
                waiting += map(int, Path(f"/proc/{process}/task/{task}/children").read_text().split())
        except (OSError, StopIteration):
            continue  # it has ended meanwhile
    return total

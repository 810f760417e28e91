"""What a run tells: metrics.jsonl and TensorBoard in its directory, a progress bar or plain lines on the terminal."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 10.0  # between lines where there is no terminal to draw a bar on
SMOOTHING = 0.9  # of the loss shown; what is written is as measured


def read_metrics(run: Path) -> list[dict]:
    """The records of a run's metrics.jsonl, in order. A line torn by a crash is left out."""
    records = []
    file = run / METRICS
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def environment() -> dict:
    """What the run's speed and last bits depend on: versions, commit, processor, threads, GPU."""
    packages = ("torch", "triton", "numpy", "safetensors", "tokenizers", "xiangxin-fast")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: _version(package) for package in packages},
        "commit": _commit(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


class JsonLines:
    """Appends records to metrics.jsonl, one line each, written through."""

    def __init__(self, run: Path):
        self._stream = (run / METRICS).open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict) -> None:
        self._stream.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._stream.close()


class TensorBoard:
    """Writes records to RUN/tb; what was written there after `step` no longer shows."""

    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and an extra

        self._writer = SummaryWriter(str(run / "tb"), purge_step=step + 1)

    def write(self, record: dict) -> None:
        for name in record.keys() - {"step", "epoch"}:
            self._writer.add_scalar(name, record[name], record["step"])

    def close(self) -> None:
        self._writer.close()


class RunLog:
    """Gives the records of a run to its sinks. One that fails is reported once and left out: training never stops."""

    def __init__(self, run: Path, step: int, console: Console):
        """Drops records after `step`, which a resumed run will write again: curves do not double back.

        `validated`: the steps whose validation loss was on record already.
        """
        kept = [record for record in read_metrics(run) if record["step"] <= step]
        self.validated = {record["step"] for record in kept if "val_loss" in record}
        partial = run / f"{METRICS}.partial"
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, run / METRICS)
        self._console, self._sinks = console, []
        for opened in (lambda: JsonLines(run), lambda: TensorBoard(run, step)):
            self._guarded(lambda opened=opened: self._sinks.append(opened()))

    def write(self, record: dict) -> None:
        """One record: "step" and numbers by name."""
        self._sinks = [sink for sink in self._sinks if self._guarded(lambda sink=sink: sink.write(record))]

    def close(self) -> None:
        for sink in self._sinks:
            self._guarded(sink.close)

    def _guarded(self, action: Callable[[], None]) -> bool:
        try:
            action()
            return True
        except Exception as error:
            self._console.print(f"metrics: not written from here on: {error}", markup=False)
            return False


class Display:
    """Shows how far training is: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self._plain_at, self._loss, self._rate, self._val = 0.0, None, None, None
        columns = (BarColumn(bar_width=10), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
        self._bar = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("Training", total=1.0, text="")
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, progress: float, record: dict) -> None:
        """`progress` 0..1 of the run, and the newest record."""
        self._val = record.get("val_loss", self._val)
        if "loss" in record:
            self._loss = _smoothed(self._loss, record["loss"])
            self._rate = _smoothed(self._rate, record["tokens_per_second"])
        parts = [f"step {record['step']:,}"]
        parts += [f"loss {self._loss:.3f}"] if self._loss is not None else []
        parts += [f"val {self._val:.3f}"] if self._val is not None else []
        parts += [f"{self._rate:,.0f} tokens/s"] if self._rate is not None else []
        parts += [f"ETA {timedelta(seconds=round(record['eta_seconds']))}"] if "eta_seconds" in record else []
        text = " | ".join(parts)
        if self._bar:
            self._bar.update(self._task, completed=progress, text=text)
        elif "val_loss" in record or time.monotonic() - self._plain_at >= PLAIN_SECONDS:
            self._plain_at = time.monotonic()
            self.console.print(f"{progress:4.0%}  {text}", markup=False, highlight=False)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else SMOOTHING * old + (1 - SMOOTHING) * new


def terminal() -> Console:
    """Where a run reports: standard error, so that standard output stays for results."""
    return Console(file=sys.stderr, soft_wrap=True)

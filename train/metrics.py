"""What a run tells, and to whom: records and events go to every sink; one that fails never stops training.

A record is one optimizer step, or one validation; all values are numbers (loss and grad_norm may be NaN):
    step                        1 is the first update
    loss                        nats per token, the mean over all valid targets of the global batch
    grad_norm, lr               global norm before clipping; rate of this update
    skipped                     1 where loss or gradient were not finite and no parameter changed, else 0
    tokens                      seen since the run began, over all its starts
    epoch                       samples drawn / samples there are, in all sources together
    progress                    0..1 of the run
    tokens_per_second           of all ranks together
    seconds, eta_seconds        spent in the loop so far, and left at this rate
    step_seconds                from the end of the step (or validation, or copy for a checkpoint) before to this one's:
        data_seconds              waiting for samples
        forward_backward_seconds  gradients, their reduction included
        optimizer_seconds         norm, clipping, AdamW
        other_seconds             the rest
    memory_bytes                peak since the start on rank 0: of the device's allocator, or of the process on a CPU
    val_loss                    of a validation, whose records have only this, step, tokens and progress
An event is something that happens rarely: {"event": kind, "step", "time" (ISO 8601, UTC), ...}. Kinds: start, save,
save_failed, rejected, skip, spike, rewind, replicas, stop, finish. They stay in events.jsonl when a run is resumed.
Of a start and of the finish, `epochs` is how often each source has been seen.
Of a skip, `ranks` had losses that were not finite; `parts` are those whose part of the summed gradient was not, which
says where in the model it was and, with finite losses, not which rank it came from.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from xiangxin_fast.config import PhiConfig

from .config import TrainConfig

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
MOST_WAITING = 1 << 20  # bytes of lines that could not be written


def read_metrics(run: Path) -> list[dict]:
    """The records of a run's metrics.jsonl, in order."""
    return read_lines(run / METRICS)


def read_lines(file: Path) -> list[dict]:
    """The JSON objects of a file, one a line, none where it does not exist. A line torn by a crash is left out."""
    records = []
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


class Sink(Protocol):
    """Somewhere that records and events go. May raise what it likes: RunLog says so once and then leaves it out.

    One that `recovers` is given the next ones all the same: a full disk is not full for ever, and which samples were
    left out is written nowhere else.
    """

    recovers: bool

    def write(self, record: dict) -> None: ...

    def event(self, event: dict) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class RunInfo:
    """What a sink may want to know when it is opened."""

    run: Path  # the run directory
    step: int  # updates made before this start; records up to here are on file
    config: TrainConfig
    model: PhiConfig
    ranks: int
    device: str  # name of rank 0's GPU, or "cpu"
    console: Console


class _Lines:
    """A file of JSON lines, written through. What could not be written waits: the next line is written after it."""

    def __init__(self, path: Path):
        self._path, self._file, self._waiting = path, None, bytearray()
        if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
            self._waiting += b"\n"  # a crash tore the last line: the next is not to be part of it

    def add(self, value: dict) -> None:
        """Raises OSError where the line has to wait, or, when too many do, is left out."""
        if len(self._waiting) < MOST_WAITING:
            self._waiting += json.dumps(value).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0)
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError:
            self._shut()  # the file system may have gone away and come back: a new handle then works, the old does not
            raise

    def _shut(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def close(self) -> None:
        """A last try for what waits."""
        self._write()
        self._shut()


class JsonLines:
    """Appends records to metrics.jsonl and events to events.jsonl, one line each, written through."""

    recovers = True

    def __init__(self, info: RunInfo):
        """Drops records after the step that the run goes on from, which it will write again: curves do not double."""
        kept = [record for record in read_metrics(info.run) if record["step"] <= info.step]
        partial = info.run / f"{METRICS}.partial"
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, info.run / METRICS)
        self._records, self._events = _Lines(info.run / METRICS), _Lines(info.run / EVENTS)

    def write(self, record: dict) -> None:
        self._records.add(record)

    def event(self, event: dict) -> None:
        self._events.add(event)

    def close(self) -> None:
        self._records.close()
        self._events.close()


class TensorBoard:
    """Writes records to RUN/tb; what was written there after the step that the run goes on from no longer shows."""

    recovers = False

    def __init__(self, info: RunInfo):
        from tensorboard.compat.proto.summary_pb2 import Summary  # slow to import, and an extra
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(info.run / "tb"), purge_step=info.step + 1)
        self._summary, self._value = Summary, Summary.Value

    def write(self, record: dict) -> None:
        # One event for all: an add_scalar for each took longer than the rest of the loop.
        values = [self._value(tag=name, simple_value=record[name]) for name in record.keys() - {"step"}]
        self._writer.file_writer.add_summary(self._summary(value=values), record["step"])

    def event(self, event: dict) -> None:
        self._writer.add_text("events", json.dumps(event), event["step"])

    def close(self) -> None:
        self._writer.close()


class RunLog:
    """Gives the records and events of a run to its sinks; one that fails is reported each time it begins to."""

    def __init__(self, info: RunInfo, sinks: Sequence[Callable[[RunInfo], Sink]]):
        self._console, self._sinks, self._failing = info.console, [], set()
        for opener in sinks:
            self._guarded(opener, lambda opener=opener: self._sinks.append(opener(info)))

    def write(self, record: dict) -> None:
        """One record, as the module's docstring lists them."""
        self._give(lambda sink: sink.write(record))

    def event(self, kind: str, step: int, **details: object) -> None:
        """Something that happens rarely; `details` are JSON values."""
        event = {"event": kind, "step": step, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **details}
        self._give(lambda sink: sink.event(event))

    def close(self) -> None:
        for sink in self._sinks:
            self._guarded(sink, sink.close)

    def _give(self, action: Callable[[Sink], None]) -> None:
        self._sinks = [s for s in self._sinks if self._guarded(s, lambda s=s: action(s)) or s.recovers]

    def _guarded(self, what: object, action: Callable[[], None]) -> bool:
        """Whether `action`, of a sink or what opens one, succeeds."""
        try:
            action()
            self._failing.discard(what)
            return True
        except Exception as error:
            if what not in self._failing:
                self._failing.add(what)
                with suppress(Exception):  # the terminal itself may be what is gone
                    self._console.print(f"metrics: not written: {error}", markup=False)
            return False


def terminal(rank: int = 0) -> Console:
    """Where a run reports: standard error, so that standard output stays for results; rank 0 speaks for all."""
    return Console(file=sys.stderr, soft_wrap=True, quiet=rank > 0)

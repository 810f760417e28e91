"""Everything that needs a GPU, in one command, for a bare machine and few minutes.

    PYTHONPATH=.:kernels python -m bench.gpu --out DIR [--minutes 8] [--only attention,train] [--commit ID]

Sections run in the order of their value, each in a process and a share of the time of its own; what one does not use,
the later ones get. Every record is on the disk before the next is measured. An item that kills its process (an illegal
access takes the CUDA context with it) costs itself: the section starts again behind it. A section that hangs is killed
at its limit. This process imports no torch, so that nothing can take it along.

DIR gets results.jsonl (every record), log.txt (what the sections printed) and table.txt, which is also printed last.
`--dry-run` walks all of it at tiny shapes on a CPU, kernels in Triton's interpreter; its figures mean nothing.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .tables import format_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS, LOG, TABLE = "results.jsonl", "log.txt", "table.txt"
LOG_BYTES_PER_SECTION = 1 << 20
RESERVE_S = 5.0  # for the table


@dataclass(frozen=True)
class Section:
    """One process of the run: its name, its share of the time, and what it is for."""

    name: str
    share: float
    what: str
    interpreted: bool = False  # a dry run takes the kernels through the interpreter: all that run ours


SECTIONS = (
    Section("device", 5, "the device, copy bandwidth, matrix rate"),
    Section("correctness", 12, "every op in bf16 against fp64, the model, greedy tokens", interpreted=True),
    Section("attention", 9, "attention beside SDPA, FlexAttention, flash-attn, xformers", interpreted=True),
    Section(
        "block", 10, "the whole layer, MLP and LayerNorm beside transformers, cuBLAS, torch.compile", interpreted=True
    ),
    Section("gemm", 7, "products with epilogues, both ways, beside cuBLAS with torch.compile", interpreted=True),
    Section("cross_entropy", 7, "plain and fused with the head, beside torch, Liger, CCE", interpreted=True),
    # The states of two such models do not fit one GPU: they take turns by section, twice each, so that drift shows.
    Section("train", 6, "training steps of the full model: tokens/s, MFU, memory", interpreted=True),
    Section("train_peer", 6, "the same with transformers, SDPA and torch.compile"),
    Section("train_again", 4, "training steps once more", interpreted=True),
    Section("train_peer_again", 4, "transformers' once more"),
    Section("generate", 9, "prefill and decode beside transformers on the same weights", interpreted=True),
    Section("decode", 5, "the ops of a decode step at 1, 8 and 32 rows", interpreted=True),
    Section("races", 4, "250 runs of every op, bit for bit", interpreted=True),
    Section("sanitizer", 5, "compute-sanitizer on small shapes"),
)


class Run:
    """The sections of one invocation, one after another, under one deadline."""

    def __init__(self, out: Path, minutes: float, command: Callable[[Section, float], list[str]]):
        self.out, self.command = out, command
        self.deadline = time.monotonic() + 60 * minutes - RESERVE_S

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def emit(self, record: dict) -> None:
        append(self.out / RESULTS, record)

    def sections(self, sections: tuple[Section, ...]) -> None:
        for i, section in enumerate(sections):
            share = section.share / sum(later.share for later in sections[i:])
            self._section(section, self._left() * share)

    def _section(self, section: Section, seconds: float) -> None:
        """Runs the section until it ends, or until it dies without having begun anything new, or to its limit."""
        begun_at, attempts, status = time.monotonic(), 0, "no time left"
        end = begun_at + seconds
        print(f"{section.name}: {section.what} ({seconds:.0f} s)", flush=True)
        while (left := end - time.monotonic()) > min(5.0, seconds / 2):
            begun = self._begun(section)
            attempts += 1
            # A little beyond its share: it stops by itself before, and killed processes leave nothing.
            status = self._attempt(section, left, limit=min(1.15 * left + 2, max(self._left(), 1.0)))
            if not status.startswith("died") or self._begun(section) == begun:
                break
        spent = time.monotonic() - begun_at
        record = {"kind": "section", "section": section.name, "status": status, "seconds": round(spent, 1)}
        self.emit(record | {"attempts": attempts})
        print(f"{section.name}: {status} after {spent:.0f} s", flush=True)

    def _begun(self, section: Section) -> int:
        return len(begun_items(self.out / RESULTS, section.name))

    def _attempt(self, section: Section, seconds: float, limit: float) -> str:
        log = self.out / LOG
        with log.open("ab") as output:
            output.write(f"\n== {section.name}\n".encode())
            output.flush()
            start = output.tell()
            process = subprocess.Popen(
                self.command(section, seconds),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=limit)
                status = "done" if code == 0 else f"died: {_cause(code)}"
            except subprocess.TimeoutExpired:
                status = f"killed at its limit of {limit:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        _shorten(log, start)
        return status


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _shorten(log: Path, start: int) -> None:
    """Keeps the beginning and the end of what was logged after `start`: the files must stay small enough to carry."""
    data = log.read_bytes()
    part = data[start:]
    if len(part) > LOG_BYTES_PER_SECTION:
        quarter = LOG_BYTES_PER_SECTION // 4
        log.write_bytes(data[:start] + part[:quarter] + b"\n[...]\n" + part[-3 * quarter :])


def append(path: Path, record: dict) -> None:
    """One JSON line, on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[dict]:
    """The records of a results file; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def begun_items(path: Path, section: str) -> list[str]:
    """The items that a section has begun so far, finished or not."""
    return [r["item"] for r in read_records(path) if r.get("kind") == "begin" and r.get("section") == section]


def _arguments() -> argparse.Namespace:
    listing = "\n".join(f"  {s.name:14s} {s.what}" for s in SECTIONS)
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        epilog=f"sections:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the results; made if absent")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default 8)")
    parser.add_argument("--only", default="", help="comma-separated sections (default: all); device always runs")
    parser.add_argument("--commit", help="the commit measured, where the tree has no history with it")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, to try the command itself")
    arguments = parser.parse_args()
    known = [section.name for section in SECTIONS]
    arguments.only = [name.strip() for name in arguments.only.split(",") if name.strip()] or known
    for name in arguments.only:
        if name not in known:
            parser.error(f"--only: expected sections of {', '.join(known)}, got {name!r}")
    if (arguments.out / RESULTS).exists():
        parser.error(f"--out: expected a directory without results, got {arguments.out}, which holds {RESULTS}")
    return arguments


def main() -> None:
    arguments = _arguments()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), str(ROOT / "kernels"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ |= {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1"}
    if arguments.commit:
        os.environ["BENCH_COMMIT"] = arguments.commit
    if arguments.dry_run:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def command(section: Section, seconds: float) -> list[str]:
        line = [sys.executable, "-m", "bench.gpu_sections", section.name, "--out", str(out)]
        if arguments.dry_run:
            line = ["env", f"TRITON_INTERPRET={int(section.interpreted)}", *line, "--dry-run"]
        return [*line, "--seconds", f"{seconds:.1f}"]

    # A time limit from outside ends the section too, and leaves the table.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wanted = tuple(s for s in SECTIONS if s.name in arguments.only or s.name == "device")
    try:
        Run(out, arguments.minutes, command).sections(wanted)
    finally:
        table = format_results(read_records(out / RESULTS))
        (out / TABLE).write_text(table + "\n")
        print(table)


if __name__ == "__main__":
    main()

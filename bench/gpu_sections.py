"""The sections of `python -m bench.gpu`; this file runs one of them.

A section is a sequence of items. Each is announced before it runs, so that the one that took the process along is known
and skipped when the section starts again; an item that merely raises costs itself.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from . import generation, races, train_step
from .case import MODES, Shape, Unavailable
from .cases import CASES, SHAPES
from .decode_check import check_graphs, check_rounded, check_rows_alone
from .gemm_cases import GEMM_CASES
from .gpu import RESULTS, append, begun_items, read_records
from .measure import Ceilings, DeviceLost, assert_alive, environment, gpu_state, measure_ceilings
from .model_check import check_greedy, check_model
from .peers import peers_of
from .runner import check, reason_of, run_case


class Work:
    """What a section needs: where it runs, at which shapes, how long, and where its records go."""

    def __init__(self, section: str, out: Path, seconds: float, dry_run: bool):
        self.section, self.dry_run = section, dry_run
        self.results = out / RESULTS
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype = torch.bfloat16
        self.shape = SHAPES["tiny" if dry_run else "phi"]
        self._deadline = time.monotonic() + seconds
        self._begun = set(begun_items(self.results, section))

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def emit(self, record: dict) -> None:
        append(self.results, {"section": self.section} | record)

    def item(self, name: str, function: Callable, *arguments, **options) -> None:
        """Runs one item, unless an earlier process began it or the time is up."""
        if name in self._begun:
            return
        if self.left <= 0:
            self.emit({"kind": "skip", "item": name, "reason": "no time left"})
            return
        self.emit({"kind": "begin", "item": name})
        print(f"-- {name}", flush=True)
        try:
            function(*arguments, **options)
        except DeviceLost:
            raise
        except Unavailable as error:
            self.emit({"kind": "skip", "item": name, "reason": str(error)})
        except Exception as error:
            traceback.print_exc()
            self.emit({"kind": "error", "item": name, "reason": reason_of(error)})
            del error
            assert_alive(self.device)

    @property
    def ceilings(self) -> Ceilings | None:
        """What the device section measured, if it got so far."""
        for record in read_records(self.results):
            if record.get("kind") == "ceilings":
                return Ceilings(record["copy_bytes_per_s"], record["matmul_flops_per_s"])
        return None

    def shapes(self, *batches: tuple[int, int]) -> list[Shape]:
        """The section's shape with other (B, T); the tiny one stays as it is."""
        return [self.shape] if self.dry_run else [replace(self.shape, B=B, T=T) for B, T in batches]

    def bench(self, op: str, against: str, shape: Shape, seconds: float, modes: tuple[str, ...] = MODES) -> None:
        peers = peers_of(op, against)
        self.item(
            f"{op} {shape} beside {', '.join(peers)}",
            run_case,
            CASES[op],
            shape,
            self.device,
            self.dtype,
            modes=modes,
            peers=peers,
            seconds=0.0 if self.dry_run else seconds,
            ceilings=self.ceilings,
            emit=self.emit,
        )


def device(work: Work) -> None:
    def ceilings() -> None:
        size = {"edge": 64, "copy_bytes": 1 << 16} if work.dry_run else {"edge": 8192, "copy_bytes": 4 << 30}
        found = measure_ceilings(work.device, work.dtype, **size, seconds=0.0 if work.dry_run else 3.0)
        work.emit({"kind": "ceilings", "state": gpu_state()} | vars(found))

    work.item("environment", lambda: work.emit({"kind": "environment"} | environment(work.device)))
    work.item("ceilings", ceilings)


def correctness(work: Work) -> None:
    # An odd length meets the masks of every tile; the long one, last since it costs most, the order of long sums.
    odd, *long = work.shapes((2, 509), (1, 2048))
    for op, case in CASES.items():
        work.item(f"{op} {odd}", check, case, odd, work.device, work.dtype, work.emit)
    work.item("model", check_model, work)
    work.item("greedy tokens", check_greedy, work)
    work.item("decode, rounded weights", check_rounded, work)
    work.item("decode, rows alone", check_rows_alone, work)
    work.item("decode, graphs", check_graphs, work)
    for shape in long:
        for op, case in CASES.items():
            work.item(f"{op} {shape}", check, case, shape, work.device, work.dtype, work.emit)


def attention(work: Work) -> None:
    for shape in work.shapes((8, 2048)):
        work.bench("attention", "sdpa,flash-attn,xformers", shape, 8)
        work.bench("attention", "flexattention", shape, 4)


def block(work: Work) -> None:
    for shape in work.shapes((8, 2048)):
        work.bench("parallel_block", "transformers", shape, 8)
        work.bench("gelu_mlp", "all", shape, 5)
        work.bench("layer_norm", "all", shape, 2)


def gemm(work: Work) -> None:
    for shape in work.shapes((8, 2048)):
        for op in GEMM_CASES:
            work.bench(op, "all", shape, 2, modes=("fwd",))


def cross_entropy(work: Work) -> None:
    for shape in work.shapes((8, 2048)):
        work.bench("linear_cross_entropy", "full logits,chunked,liger,cut", shape, 6)
        work.bench("linear_cross_entropy", "torch.compile", shape, 4)
        work.bench("cross_entropy", "all", shape, 3)


def train(work: Work) -> None:
    work.item("train, ours", train_step.bench_ours, work)


def train_peer(work: Work) -> None:
    work.item("train, transformers", train_step.bench_transformers, work)


def generate(work: Work) -> None:
    sizes = (1, 2) if work.dry_run else (1, 8, 32)
    contenders = generation.Contenders(work, max(sizes))
    work.item("prefill", generation.bench_prefill, work, contenders)
    for rows in sizes:
        work.item(f"decode, {rows} rows", generation.bench_decode, work, contenders, rows)


def decode(work: Work) -> None:
    for shape in work.shapes((1, 2048), (8, 2048), (32, 2048)):
        for op in ("decode_attention", "decode_block", "decode_head"):
            work.bench(op, "all", shape, 1)


def races_section(work: Work) -> None:
    for op, case in CASES.items():
        for shape in work.shapes((2, 509)):
            work.item(f"{op} {shape}", races.repeat, work, case, shape)


def sanitizer(work: Work) -> None:
    for tool in ("memcheck", "racecheck"):
        work.item(tool, races.sanitize, work, tool)


SECTIONS = {
    "device": device,
    "correctness": correctness,
    "attention": attention,
    "block": block,
    "gemm": gemm,
    "cross_entropy": cross_entropy,
    "train": train,
    "train_peer": train_peer,
    "train_again": train,
    "train_peer_again": train_peer,
    "generate": generate,
    "decode": decode,
    "races": races_section,
    "sanitizer": sanitizer,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_sections", description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    work = Work(arguments.section, arguments.out, arguments.seconds, arguments.dry_run)
    if not arguments.dry_run and not torch.cuda.is_available():
        work.emit(
            {"kind": "error", "reason": "expected a CUDA device, got none; --dry-run walks the sections on a CPU"}
        )
        sys.exit(1)
    SECTIONS[arguments.section](work)


if __name__ == "__main__":
    main()

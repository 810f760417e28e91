"""`python -m bench.static`: what the compiler makes of every kernel config, and how fast it could be. Needs no GPU.

Columns: registers; shared memory; warps of a block x blocks an SM holds; spills (STL, LDL) in the hot loops and
elsewhere; instructions of the hot loop (special functions, FP32, integer, shared memory, global memory); matrix FLOPs
issued per useful one; share of the bytes that move 16 at a time; bytes an SM has under way; bulk copies; cycles of one
pass on the tensor cores and on the busiest pipe; and for the launch at the Phi shape the roofline's floor, the bound,
what to expect, floor / bound.

How far to trust it. The counts are facts, the bound holds as far as the rates in `bench.roofline` do (its sources are
there). The expected time is a model with one fitted constant, held against what others published (`static_checks.py`
has a GEMM and causal attention of our own, T = 2048; TFLOP/s):

                                      bound   expected   published for kernels of the same make
    A100  GEMM 128x256x64, 8 warps      312        244   241-268: Triton 89-99% of cuBLAS (triton #6523), cuBLAS 271
    A100  attention D 64, 4 warps       294        144   152 (triton #1934)
    A100  attention D 128, 8 warps      225        142   154 (triton #1934)
    H100  GEMM, persistent, bulk        962        659   523-730: 92% of cuBLAS (triton #5726), cuBLAS 568-794
    H100  GEMM, pointers                900        637   432-604: 76% of cuBLAS (triton #5726)
    H100  attention D 64, 8 warps       822        364   342-363 (FA3 paper's Triton bars)
    H100  attention D 128, 8 warps      923        462   434 (tritonbench), 323 (FA3 paper's bars)

So: within 10% of the newest figures for attention and for GEMMs with bulk copies; too kind to wgmma behind plain loads.
It ranks tiles as is known (128x256 over 128x64 over 64x64; bulk copies over pointers; on an A100 four warps of 32 rows
over eight of 16, as FlashAttention-2 chose; D 128 over D 64), but two candidates within 10% of each other are a tie:
latency, barriers, L2 hit rates and power are in the constant, so few warps per SM and small tiles look better here than
they are. A GPU has the last word (`python -m bench.tune`).
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from xiangxin_kernels._tuning import ARCHS

from bench import budget
from bench.cases import SHAPES
from bench.static_cases import CHECKS, OPS
from bench.static_compile import DTYPES, CompileError, Job, compile_all, find_case
from bench.static_model import Row, analyze
from xiangxin_fast.errors import InputError, exits_cleanly


def jobs_of(
    op: str, archs: Iterable[int] = ARCHS, dtypes: Iterable[str] = ("bf16",), configs: Iterable | str | None = None
) -> list[Job]:
    """The jobs of an op: the chosen configs, or those listed, or with "candidates" every candidate of its cases."""
    jobs = []
    for case in OPS[op](SHAPES["phi"]):
        for arch in archs:
            wanted = case.candidates.get(arch, ()) if configs == "candidates" else configs or [None]
            for dtype in dtypes:
                for config in wanted:
                    fields = config and tuple(dataclasses.asdict(config).items())
                    jobs.append(Job(case.name, arch, dtype, fields))
    return jobs


def examine(jobs: list[Job], workers: int = 2, progress: bool = True) -> dict[Job, list[Row] | CompileError]:
    """Compiles and reads all jobs; a job that fails to compile maps to its CompileError."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("compiling", total=len(jobs))
        compiled = compile_all(jobs, workers, lambda job: bar.update(task, advance=1, description=str(job)))
    results: dict[Job, list[Row] | CompileError] = {}
    for job, made in compiled.items():
        if isinstance(made, CompileError):
            results[job] = made
        else:
            work = find_case(job.case).work
            try:
                results[job] = [analyze(job, c, work[c.kernel]) for c in made]
            except CompileError as error:
                results[job] = error
    return results


def rows_of(results: dict[Job, list[Row] | CompileError]) -> list[Row]:
    """All the rows there are, in order."""
    return [row for rows in results.values() if not isinstance(rows, CompileError) for row in rows]


def _cells(row: Row, name: str) -> list[str]:
    i, busiest = row.instructions, max(row.cycles, key=row.cycles.__getitem__)
    return [
        name,
        str(row.arch),
        " ".join(str(value) for value in row.config.values()),
        str(row.registers),
        f"{row.shared / 1024:.0f}",
        f"{row.warps} x {row.blocks_per_sm}",
        f"{row.spills_in_loop} / {row.spills_elsewhere}",
        f"{i['all']}: {i['mufu']} {i['fp32']} {i['int']} {i['shared']} {i['global']}",
        f"{row.flops_ratio:.2f}" if row.flops_ratio else "",
        f"{row.wide_fraction:.2f}",
        f"{row.in_flight / 1024:.0f}",
        " ".join(f"{count} {name}" for name, count in row.bulk.items()) + (" specialized" * row.warp_specialized),
        f"{row.cycles['tensor']:.0f}",
        f"{row.cycles[busiest]:.0f} {busiest}",
        f"{row.floor_us:.0f}",
        f"{row.bound_us:.0f} {row.limiter}",
        f"{row.estimate_us:.0f}",
        f"{100 * row.peak_fraction:.0f}%",
    ]


def table(results: dict[Job, list[Row] | CompileError]) -> Table:
    """One line per kernel: the compiler's figures, the hot loop, and times at the Phi shape on A800 or H100."""
    shape = SHAPES["phi"]
    out = Table(title=f"Hot loops, cycles of one pass on an SM, microseconds at {shape} on A800 (80) and H100 (90)")
    for name in ("kernel", "arch", "config"):
        out.add_column(name, overflow="fold")
    for name in (
        "regs", "smem KB", "warps x blocks", "spills loop / else", "instr: mufu fp32 int smem gmem", "issued / useful",
        "wide", "KB in flight", "bulk", "tensor", "busiest pipe", "floor us", "bound us", "expected us", "at most",
    ):  # fmt: skip
        out.add_column(name, justify="right")
    for job, rows in results.items():
        if isinstance(rows, CompileError):
            out.add_row(job.case, str(job.arch), str(job).rpartition("|")[2], f"[red]{rows}[/red]")
            continue
        for row in rows:
            out.add_row(*_cells(row, row.case if len(rows) == 1 else f"{row.case} {row.kernel}"))
    return out


def report(
    op: str, archs: Iterable[int] = ARCHS, dtypes: Iterable[str] = ("bf16",), configs: Iterable | str | None = None
) -> list[Row]:
    """Prints the table of an op and returns its rows; `configs` as in `jobs_of`."""
    results = examine(jobs_of(op, archs, dtypes, configs))
    Console().print(table(results))
    return rows_of(results)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a config failed to compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=sorted(OPS), metavar="OP", help=", ".join(sorted(OPS)))
    parser.add_argument("--arch", action="append", type=int, choices=(80, 90), help="default both")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES), help="default bf16")
    parser.add_argument("--candidates", action="store_true", help="those of the sweep, not the chosen configs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="put the rows into that file, in place of older ones")
    parser.add_argument("--workers", type=int, default=2, help="compiler processes, default 2")
    parser.add_argument("--triton", action="store_true", help="say which Triton compiles, and stop")
    a = parser.parse_args(arguments)
    if a.triton:
        print(f"triton {triton.__version__} in {Path(triton.__file__).parent}")
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("bench.static: expected the compiler, got TRITON_INTERPRET=1: unset it")
    jobs = [
        job
        for op in a.only or [op for op in OPS if op not in CHECKS]
        for job in jobs_of(op, a.arch or ARCHS, a.dtype or ("bf16",), "candidates" if a.candidates else None)
    ]
    results = examine(jobs, a.workers)
    Console(width=None if sys.stdout.isatty() else 250).print(table(results))
    if a.json:
        cases = {case.name for op in OPS.values() for case in op(SHAPES["phi"])}
        budget.save(
            [row for rows in results.values() if not isinstance(rows, CompileError) for row in rows], a.json, cases
        )
    return 1 if any(isinstance(rows, CompileError) for rows in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.static`: what the compiler makes of every kernel config, and how fast it could be at most. No GPU.

Work in progress docstring.
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
        f"{i['all']}: {i['mufu']} {i['fp32']} {i['int']}",
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
        "regs", "smem KB", "warps x blocks", "spills loop / else", "instr: mufu fp32 int", "issued / useful", "wide",
        "KB in flight", "bulk", "tensor", "busiest pipe", "floor us", "bound us", "expected us", "at most",
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

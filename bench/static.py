"""`python -m bench.static`: what the compiler makes of every kernel config, and how fast it could be at most. No GPU.

Work in progress docstring.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench import sass
from bench.cases import SHAPES
from bench.roofline import REPORTED, blocks_per_sm, loop_cycles, overlapped, pipe_cycles
from bench.static_cases import CHECKS, OPS, Work
from bench.static_compile import DTYPES, Compiled, CompileError, Job, compile_all, find_case
from bench.ttir import i32_offset_products

ATTAINABLE = 0.85


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel of one config on one architecture. Cycles are of one SM and one hot-loop pass of one program."""

    case: str
    kernel: str
    arch: int
    dtype: str
    config: dict[str, Any]
    registers: int
    shared: int
    warps: int
    blocks_per_sm: int
    spills_in_loop: int
    spills_elsewhere: int
    tensor: dict[str, int]
    flops_ratio: float  # matrix FLOPs issued per useful one; 0 without matrix work
    instructions: dict[str, int]  # of the first hot loop (or of the whole kernel), per warp
    wide_fraction: float
    bulk: dict[str, int]
    warp_specialized: bool
    cycles: dict[str, float]  # by pipe, of the first hot loop (or of the whole kernel)
    limiter: str
    floor_us: float  # roofline at the Phi shape
    bound_us: float  # every pipe overlaps perfectly
    estimate_us: float  # what to expect: see the docstring of bench.static
    peak_fraction: float  # roofline / bound: the most this config can reach
    offset_products: list[str]

    @property
    def key(self) -> str:
        config = ",".join(f"{k}={v}" for k, v in self.config.items())
        return f"{self.case}|{self.kernel}|sm_{self.arch}|{self.dtype}|{config}"


def _merged(counts: Sequence[sass.Counts], weights: Sequence[float], warps: float, arch: int, bulk: int) -> dict:
    total: dict[str, float] = {}
    for part, weight in zip(counts, weights, strict=True):
        for pipe, cycles in pipe_cycles(part, warps, arch, bulk).items():
            total[pipe] = total.get(pipe, 0.0) + weight * cycles
    return total


def analyze(job: Job, compiled: Compiled, work: Work) -> Row:
    """Reads one compiled kernel and bounds it. CompileError when it has another number of hot loops than its Work."""
    gpu = REPORTED[job.arch]
    listing = sass.parse(compiled.sass)
    whole = sass.count(listing.instructions)
    hot = sass.hot_loops(listing.instructions)
    inside = {i.address for loop in hot for i in loop}
    loops = [sass.count(loop) for loop in hot]
    rest = sass.count(i for i in listing.instructions if i.address not in inside)
    specialized = whole.register_requests > 0
    warps = compiled.numbers["num_warps"] if specialized else compiled.threads // 32

    trips, bodies = work.trips(compiled.numbers), work.bodies(compiled.numbers)
    if len(hot) != len(trips) and not specialized:
        trips = tuple(t for t in trips if t != bodies)  # a loop of one pass is no loop in the machine code
    if not trips:
        loops, rest = [], whole
    elif len(hot) % len(trips) or (len(hot) != len(trips) and not specialized):
        raise CompileError(f"expected {len(trips)} hot loops in {compiled.kernel}, got {len(hot)}")
    weights = [trips[n % len(trips)] for n in range(len(loops))]
    in_loops = _merged(loops, weights, warps, job.arch, compiled.bulk_bytes)
    outside = _merged([rest], [bodies], warps, job.arch, 0)
    total = {pipe: in_loops.get(pipe, 0.0) + outside[pipe] for pipe in outside}
    seconds = {pipe: cycles / (gpu.sms * gpu.clock) for pipe, cycles in total.items()}
    seconds["memory"] = work.bytes / gpu.bandwidth
    limiter = max(seconds, key=seconds.__getitem__)
    blocks = blocks_per_sm(job.arch, compiled.threads, listing.registers, compiled.shared)
    passes = [
        weight * loop_cycles(loop, warps, job.arch, compiled.bulk_bytes)
        for loop, weight in zip(loops, weights, strict=True)
    ]
    around = bodies * overlapped(pipe_cycles(rest, warps, job.arch)) / max(1, blocks if loops else 1)
    estimate = max((sum(passes) + around) / (gpu.sms * gpu.clock), seconds["memory"]) / ATTAINABLE
    floor = max(work.flops / gpu.flops, work.bytes / gpu.bandwidth)
    issued = sum(weight * loop.flops for loop, weight in zip(loops, weights, strict=True)) * warps + (
        bodies * warps * rest.flops
    )
    first = loops[0] if loops else whole
    in_hot = loops or [whole]
    spilled = sum(c.spill_loads + c.spill_stores for c in loops)
    bulk = sum((c.bulk for c in [*loops, rest]), start=type(whole.bulk)())
    moved = [c for c in in_hot if c.global_load_bytes or c.global_store_bytes]
    return Row(
        case=job.case, kernel=compiled.kernel, arch=job.arch, dtype=job.dtype, config=compiled.config,
        registers=listing.registers, shared=compiled.shared, warps=compiled.threads // 32,
        blocks_per_sm=blocks,
        spills_in_loop=spilled, spills_elsewhere=whole.spill_loads + whole.spill_stores - spilled,
        tensor=dict(first.tensor), flops_ratio=issued / work.flops if work.flops else 0.0,
        instructions={
            "all": first.instructions, "mufu": first.mufu, "fp32": first.fp32,
            "int": first.int32 + first.int_multiply, "convert": first.convert, "shared": first.lsu,
            "loads": first.global_load_bytes.total() // 512, "barriers": first.barriers,
        },
        wide_fraction=min((c.wide_fraction for c in moved), default=1.0), bulk=dict(bulk),
        warp_specialized=specialized,
        cycles={k: round(v, 1) for k, v in pipe_cycles(first, warps, job.arch, compiled.bulk_bytes).items()},
        limiter=limiter, floor_us=floor * 1e6, bound_us=seconds[limiter] * 1e6,
        estimate_us=estimate * 1e6, peak_fraction=floor / seconds[limiter],
        offset_products=i32_offset_products(compiled.ttir),
    )  # fmt: skip


def jobs_of(
    op: str, archs: Iterable[int] = (80, 90), dtypes: Iterable[str] = ("bf16",), configs: Iterable | str | None = None
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


def table(results: dict[Job, list[Row] | CompileError]) -> Table:
    out = Table(title="Hot loop of each kernel and the bound at the Phi shape (B 8, T 2048); cycles per pass and SM")
    for name in ("kernel", "arch", "config"):
        out.add_column(name, overflow="fold")
    for name in (
        "regs", "smem KB", "warps x blocks", "spills loop/else", "instr", "mufu fp32 int", "issued/useful", "wide",
        "bulk", "tensor cyc", "limit cyc", "floor us", "bound us", "expected", "at most",
    ):  # fmt: skip
        out.add_column(name, justify="right")
    for job, rows in results.items():
        if isinstance(rows, CompileError):
            out.add_row(job.case, str(job.arch), str(job).rpartition("|")[2], f"[red]{rows}[/red]")
            continue
        for r in rows:
            i = r.instructions
            out.add_row(
                f"{r.case} {r.kernel.removeprefix('_').removesuffix('_kernel')}", str(r.arch), " ".join(f"{v}" for v in r.config.values()), str(r.registers),
                f"{r.shared / 1024:.0f}", f"{r.warps} x {r.blocks_per_sm}", f"{r.spills_in_loop}/{r.spills_elsewhere}",
                str(i["all"]), f"{i['mufu']} {i['fp32']} {i['int']}", f"{r.flops_ratio:.2f}", f"{r.wide_fraction:.2f}",
                " ".join(f"{v} {k}" for k, v in r.bulk.items()), f"{r.cycles['tensor']:.0f}",
                f"{max(r.cycles.values()):.0f} {max(r.cycles, key=r.cycles.__getitem__)}", f"{r.floor_us:.0f}",
                f"{r.bound_us:.0f} {r.limiter}", f"{r.estimate_us:.0f}", f"{100 * r.peak_fraction:.0f}%",
            )  # fmt: skip
    return out


def report(
    op: str, archs: Iterable[int] = (80, 90), dtypes: Iterable[str] = ("bf16",), configs: Iterable | str | None = None
) -> list[Row]:
    """Prints the table of an op and returns its rows; `configs` as in `jobs_of`."""
    results = examine(jobs_of(op, archs, dtypes, configs))
    Console().print(table(results))
    return [row for rows in results.values() if not isinstance(rows, CompileError) for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=sorted(OPS), help="an op; may be given again")
    parser.add_argument("--arch", action="append", type=int, choices=(80, 90), help="default both")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES), help="default bf16")
    parser.add_argument("--candidates", action="store_true", help="those of the sweep, not the chosen configs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--workers", type=int, default=2, help="compiler processes")
    parser.add_argument("--triton", action="store_true", help="print the version of Triton that compiles, and stop")
    a = parser.parse_args(arguments)
    if a.triton:
        print(f"triton {triton.__version__} from {Path(triton.__file__).parent}")
        return 0
    jobs = [
        job
        for op in a.only or [op for op in OPS if op not in CHECKS]
        for job in jobs_of(op, a.arch or (80, 90), a.dtype or ("bf16",), "candidates" if a.candidates else None)
    ]
    results = examine(jobs, a.workers)
    Console(width=None if sys.stdout.isatty() else 250).print(table(results))
    if a.json:
        rows = [dataclasses.asdict(r) for rows in results.values() if not isinstance(rows, CompileError) for r in rows]
        a.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    return 1 if any(isinstance(rows, CompileError) for rows in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

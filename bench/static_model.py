"""From a compiled kernel to its Row: what the machine code holds, and what the pipes' rates make of it.

bound      every pipe works in parallel with all others, and with memory: no launch is faster, whatever the scheduling
estimate   what to expect. In a loop where floating-point work stands between products (softmax), tensor cores and the
           busiest of the other arithmetic pipes take turns; the result and the copying pipes overlap as a 4-norm (so a
           second busy pipe costs something); code around the loops is exposed once per block an SM holds; and the
           hardware reaches ATTAINABLE of that (issue gaps, barriers, L2 misses, power limits). `bench.static` says how
           that compares with published figures.
"""

import dataclasses
from typing import Any

import triton

from bench import sass
from bench.roofline import REPORTED, blocks_per_sm, loop_cycles, overlapped, pipe_cycles
from bench.static_case import Work
from bench.static_compile import Compiled, CompileError, Job
from bench.ttir import i32_offset_products

ATTAINABLE = 0.85


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel of one config on one architecture, launched once at the Phi shape.

    Instructions are counted per warp and cycles per SM, for one pass through the first hot loop of a program, or
    through the whole kernel where there is no hot loop.
    """

    case: str
    kernel: str
    arch: int
    dtype: str
    triton: str
    config: dict[str, Any]
    registers: int
    shared: int  # bytes per block
    warps: int
    blocks_per_sm: int
    waves: float  # programs over the programs the GPU holds at once
    spills_in_loop: int  # STL and LDL in all hot loops
    spills_elsewhere: int
    tensor: dict[str, int]
    flops_ratio: float  # matrix FLOPs issued per useful one; 0 without matrix work
    instructions: dict[str, int]
    wide_fraction: float  # of the bytes moved by loads and stores, the worst hot loop
    in_flight: int  # bytes an SM has loads out for, when each warp is one pass ahead
    bulk: dict[str, int]
    warp_specialized: bool
    cycles: dict[str, float]  # by pipe
    limiter: str
    floor_us: float  # roofline: FLOPs and bytes at the peaks
    bound_us: float  # every pipe works in parallel with the others
    estimate_us: float
    peak_fraction: float  # floor / bound: the most this config can reach
    offset_products: list[str]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A kernel as hot loops, each with its passes over the whole grid, and the rest, which runs `bodies` times."""

    whole: sass.Counts
    loops: list[sass.Counts]
    passes: list[float]
    rest: sass.Counts
    bodies: int
    warps: int  # that walk through a loop together
    bulk_bytes: int

    @property
    def first(self) -> sass.Counts:
        return self.loops[0] if self.loops else self.whole

    @property
    def flops(self) -> float:
        """Matrix FLOPs issued by all programs."""
        in_loops = sum(passes * loop.flops for loop, passes in zip(self.loops, self.passes, strict=True))
        return self.warps * (in_loops + self.bodies * self.rest.flops)

    def cycles(self, arch: int) -> dict[str, float]:
        """SM cycles of each pipe, over all programs."""
        total = {pipe: self.bodies * c for pipe, c in pipe_cycles(self.rest, self.warps, arch).items()}
        for loop, passes in zip(self.loops, self.passes, strict=True):
            for pipe, c in pipe_cycles(loop, self.warps, arch, self.bulk_bytes).items():
                total[pipe] += passes * c
        return total

    def expected_cycles(self, arch: int, blocks: int) -> float:
        around = self.bodies * overlapped(pipe_cycles(self.rest, self.warps, arch))
        return around / (blocks if self.loops else 1) + sum(
            passes * loop_cycles(loop, self.warps, arch, self.bulk_bytes)
            for loop, passes in zip(self.loops, self.passes, strict=True)
        )


def _parts(listing: sass.Listing, compiled: Compiled, work: Work) -> _Parts:
    whole = sass.count(listing.instructions)
    hot = sass.hot_loops(listing.instructions)
    specialized = whole.register_requests > 0
    passes, bodies = work.trips(compiled.numbers), work.bodies(compiled.numbers)
    if not passes and whole.flops and work.flops:
        raise CompileError(f"expected the trips of {compiled.kernel}'s hot loops in its Work, got none")
    if len(hot) != len(passes) and not specialized:
        passes = tuple(p for p in passes if p != bodies)  # a loop of one pass is no loop in the machine code
    if len(hot) % len(passes) if passes and specialized else len(hot) != len(passes) and passes:
        raise CompileError(f"expected {len(passes)} hot loops in {compiled.kernel}, got {len(hot)}")
    if not passes:
        hot = []
    inside = {i.address for loop in hot for i in loop}
    return _Parts(
        whole=whole,
        loops=[sass.count(loop) for loop in hot],
        passes=[passes[n % len(passes)] for n in range(len(hot))],  # specialized: the same loops, one set a consumer
        rest=sass.count(i for i in listing.instructions if i.address not in inside),
        bodies=bodies,
        warps=compiled.numbers["num_warps"] if specialized else compiled.threads // 32,
        bulk_bytes=compiled.bulk_bytes,
    )


def analyze(job: Job, compiled: Compiled, work: Work) -> Row:
    """Reads one compiled kernel and bounds it. CompileError when it has other hot loops than its Work says."""
    gpu = REPORTED[job.arch]
    listing = sass.parse(compiled.sass)
    parts = _parts(listing, compiled, work)
    first, whole = parts.first, parts.whole
    blocks = blocks_per_sm(job.arch, compiled.threads, listing.registers, compiled.shared)
    rate = gpu.sms * gpu.clock
    seconds = {pipe: c / rate for pipe, c in parts.cycles(job.arch).items()}
    seconds["memory"] = work.bytes / gpu.bandwidth
    limiter = max(seconds, key=seconds.__getitem__)
    floor = max(work.flops / gpu.flops, seconds["memory"])
    expected = max(parts.expected_cycles(job.arch, max(1, blocks)) / rate, seconds["memory"]) / ATTAINABLE
    spilled = sum(c.spill_loads + c.spill_stores for c in parts.loops)
    moving = [c for c in parts.loops or [whole] if c.global_load_bytes or c.global_store_bytes]
    cycles = pipe_cycles(first, parts.warps, job.arch, compiled.bulk_bytes)
    return Row(
        case=job.case,
        kernel=compiled.kernel,
        arch=job.arch,
        dtype=job.dtype,
        triton=triton.__version__,
        config=compiled.config,
        registers=listing.registers,
        shared=compiled.shared,
        warps=compiled.threads // 32,
        blocks_per_sm=blocks,
        waves=round(compiled.numbers["grid"] / (gpu.sms * max(1, blocks)), 2),
        spills_in_loop=spilled,
        spills_elsewhere=whole.spill_loads + whole.spill_stores - spilled,
        tensor=dict(first.tensor),
        flops_ratio=round(parts.flops / work.flops, 4) if work.flops else 0.0,
        instructions={
            "all": first.instructions,
            "mufu": first.mufu,
            "fp32": first.fp32,
            "int": first.int32 + first.int_multiply,
            "convert": first.convert,
            "shared": first.shared,
            "global": first.global_,
            "shuffle": first.shuffle,
            "barriers": first.barriers,
        },
        wide_fraction=round(min((c.wide_fraction for c in moving), default=1.0), 4),
        in_flight=blocks * (parts.warps * first.global_load_bytes.total() + compiled.bulk_bytes),
        bulk=dict(whole.bulk),
        warp_specialized=whole.register_requests > 0,
        cycles={pipe: round(c, 1) for pipe, c in cycles.items()},
        limiter=limiter,
        floor_us=round(floor * 1e6, 2),
        bound_us=round(seconds[limiter] * 1e6, 2),
        estimate_us=round(expected * 1e6, 2),
        peak_fraction=round(floor / seconds[limiter], 4),
        offset_products=i32_offset_products(compiled.ttir),
    )

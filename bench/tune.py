"""`python -m bench.tune --minutes 8`: times the tile candidates of every op on this GPU, prints rows for `_tuning.py`.

Candidates that `bench.static` finds to spill in a hot loop or not to fit into shared memory are left out. The others
run in a child process, which a crash ends without ending the sweep: each is judged by the numerics rule first, then all
that passed take turns (`bench.measure`), so that clocks and heat fall on them alike. Rows go into `_tuning.py` by hand,
where a person sees what changes; the chosen config is always among the candidates, and a row that does not beat it by
more than the spread is not worth pasting.

`--dry-run` walks the same path on a CPU, in Triton's interpreter, at tiny shapes with two candidates: its figures mean
nothing.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from xiangxin_kernels._tuning import arch_of

from bench import static
from bench.cases import CASES, SHAPES, Shape
from bench.measure import interleaved
from bench.runner import check, reason_of
from bench.static_cases import CHECKS, OPS
from bench.static_compile import CompileError, Job, find_case, forced
from xiangxin_fast.errors import InputError, exits_cleanly

DRY_RUN_S = 300  # of a sweep in the interpreter
# Of a sweep's seconds: judging, which compiles, ends after this share, and timing takes the next. The rest is imports.
JUDGING, TIMING = 0.5, 0.3

Config = tuple[tuple[str, Any], ...] | None  # None: what `_tuning.py` chooses


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one candidate: its milliseconds, or the reason why it has none."""

    config: Config
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    reason: str = ""


def rejected(outcome: list[static.Row] | CompileError) -> str:
    """Why a candidate need not run: the compiler's error, spills in a hot loop, more than an SM holds; else ""."""
    if isinstance(outcome, CompileError):
        return str(outcome)
    for row in outcome:
        if row.spills_in_loop:
            return f"{row.spills_in_loop} spills in the hot loop of {row.kernel}"
        if not row.blocks_per_sm:
            return f"{row.shared} bytes of shared memory in {row.kernel}: an SM cannot hold a block"
    return ""


def sweep(
    case: str, configs: list[Config], seconds: float, dry_run: bool, command: Sequence[str] = ("-m", "bench.tune")
) -> list[Result]:
    """Times `configs` in a child process, and again without the one that killed it. It ends within `seconds`."""
    results: list[Result] = []
    remaining, ends = list(configs), time.monotonic() + seconds
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1"}
    while remaining:
        left_s = ends - time.monotonic()
        task = json.dumps({"case": case, "configs": remaining, "seconds": left_s, "dry_run": dry_run})
        child = subprocess.Popen(
            [sys.executable, *command, "--child", task], env=environment, stdout=subprocess.PIPE, text=True
        )
        judging = None
        try:
            output, _ = child.communicate(timeout=max(0.0, left_s))
            reason = f"the child process died (exit code {child.returncode})"
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            reason = "out of time"
        for line in output.splitlines():
            record = json.loads(line)
            config = _config(record.pop("config"))
            if record == {"judging": True}:
                judging = config
            else:
                results.append(Result(config, **record))
        settled = {result.config for result in results}
        if child.returncode == 0:
            return results
        left = [config for config in remaining if config not in settled]
        if reason == "out of time" or judging not in left:  # it died while timing: nobody knows on whom
            return results + [Result(config, reason=reason) for config in left]
        results.append(Result(judging, reason=reason))
        remaining = [config for config in left if config != judging]
    return results


def _config(held: list | None) -> Config:
    return None if held is None else tuple((name, value) for name, value in held)


def _tensors(job_case, shape: Shape, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def new(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if not dtype.is_floating_point:
            return torch.randint(shape.config.vocab, size, generator=generator, device=device, dtype=dtype)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    return job_case.tensors(new)


def child(task: dict[str, Any], out) -> None:
    """Judges the configs while there is time, then times those that passed; a line on `out` before each verdict and
    for each result."""
    judging_ends = time.monotonic() + JUDGING * task["seconds"]
    device = torch.device("cpu" if task["dry_run"] else "cuda")
    shape = SHAPES["tiny" if task["dry_run"] else "phi"]
    judged_shape = shape if task["dry_run"] else dataclasses.replace(shape, B=1, T=391)  # no multiple of any tile
    case = find_case(task["case"], shape)
    op, passed = CASES[case.judge or case.name.partition("/")[0]], []

    def say(config: Config, **record) -> None:
        print(json.dumps({"config": config, **record}), file=out, flush=True)

    for config in map(_config, task["configs"]):
        if passed and time.monotonic() > judging_ends:
            say(config, reason="not tried: out of time")
            continue
        say(config, judging=True)
        verdicts: list[dict] = []
        try:
            with forced(case, None, config):
                check(op, judged_shape, device, torch.bfloat16, verdicts.append)
        except Exception as error:
            say(config, reason=reason_of(error))
            continue
        if verdicts[0]["passed"]:
            passed.append(config)
        else:
            say(config, reason=f"error {verdicts[0]['ratio']:.2f} times what the numerics rule allows")
    tensors = _tensors(case, shape, device)

    def turn(config: Config):
        def run(start) -> None:
            with forced(case, None, config):
                start()
                case.launch(tensors)

        return run

    names = {str(config): config for config in passed}
    turns = {name: turn(config) for name, config in names.items()}
    timings, failed = interleaved(turns, device, 0.0 if task["dry_run"] else TIMING * task["seconds"])
    for name, config in names.items():
        if name in timings:
            t = timings[name]
            say(config, median=t.median, p20=t.p20, p80=t.p80)
        else:
            say(config, reason=failed[name])


def candidates(case: str, arch: int) -> list[Config]:
    """The chosen config (None) and every candidate of the case."""
    return [None, *(tuple(dataclasses.asdict(c).items()) for c in find_case(case).candidates.get(arch, ()))]


def report(console: Console, case: str, arch: int, results: Iterable[Result], where: str) -> None:
    """Prints the results of a case, fastest first, each as a row for `_tuning.py`."""
    console.print(f"\n[bold]{case}[/bold] sm_{arch}")
    ranked = sorted(results, key=lambda r: math.inf if r.median is None else r.median)
    for r in ranked:
        what = "chosen now" if r.config is None else ", ".join(f"{name}={value}" for name, value in r.config)
        if r.median is None:
            console.print(f"    {what}: {r.reason}", style="dim", markup=False)
        else:
            spread = f"{1e3 * r.p20:.1f}-{1e3 * r.p80:.1f}"
            console.print(f"    ({what})  # measured {1e3 * r.median:.1f} us ({spread}) {where}", markup=False)


def _where(device: torch.device, dry_run: bool) -> str:
    name = "in the interpreter: means nothing" if dry_run else torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}, {time.strftime('%Y-%m-%d')}"


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, compiling included; default 8")
    parser.add_argument("--op", action="append", choices=sorted(set(OPS) - set(CHECKS)), help="may be given again")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in the interpreter, at tiny shapes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.child:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        child(json.loads(a.child), answers)
        return
    if not a.dry_run and not torch.cuda.is_available():
        raise InputError("bench.tune: expected a CUDA device, got none; --dry-run needs none")
    device = torch.device("cpu" if a.dry_run else "cuda")
    arch, started = arch_of(device), time.monotonic()
    console = Console(width=160)
    cases = [case.name for op in a.op or OPS if op not in CHECKS for case in OPS[op](SHAPES["phi"])]
    cases = [case for case in cases if candidates(case, arch)[1:]]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("sweep", total=len(cases))
        for done, case in enumerate(cases):
            bar.update(task, description=case)
            configs = candidates(case, arch)[: 2 if a.dry_run else None]
            jobs = {Job(case, arch, "bf16", config): config for config in configs}
            outcomes = static.examine(list(jobs), workers=max(2, (os.cpu_count() or 2) // 2), progress=False)
            refused = [Result(jobs[job], reason=text) for job, rows in outcomes.items() if (text := rejected(rows))]
            left = 60 * a.minutes - (time.monotonic() - started)
            share = DRY_RUN_S if a.dry_run else left / (len(cases) - done)
            kept = [config for config in configs if config not in {r.config for r in refused}]
            report(console, case, arch, sweep(case, kept, share, a.dry_run) + refused, _where(device, a.dry_run))
            bar.advance(task)
    console.print("Paste what wins by more than its spread into kernels/xiangxin_kernels/_tuning.py, comment included.")


if __name__ == "__main__":
    main()

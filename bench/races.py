"""What tells a race: bits that change between runs of the same inputs, and what compute-sanitizer sees."""

import os
import re
import shutil
import subprocess
import sys

import torch

from .case import Case, Shape, make_inputs, of_inputs
from .cases import CASES, SHAPES
from .runner import with_gradients

REPEATS = 250
LEAST_S = 5.0  # of a sanitizer


def _results(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype):
    """A function that runs the op forward and backward once and returns everything it computed."""
    inputs = make_inputs(case, shape, device, dtype)
    run = of_inputs(case.ours)(case, inputs, shape)
    dout = torch.randn_like(run.forward()) if run.leaves else None
    return lambda: list(with_gradients(run.forward, run.leaves, dout))


def repeat(work, case: Case, shape: Shape) -> None:
    """Runs the op REPEATS times on the same inputs and counts the runs whose bits differ from the first's."""
    once = _results(case, shape, work.device, work.dtype)
    first = once()
    repeats = 2 if work.dry_run else REPEATS
    differing = sum(not all(map(_same_bits, first, once())) for _ in range(repeats))
    work.emit({"kind": "race", "op": case.op, "shape": str(shape), "repeats": repeats, "differing": differing})


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b)))


def parse_sanitizer(output: str) -> tuple[int | None, list[str]]:
    """Errors (or hazards) by compute-sanitizer's own summary, None where it printed none, and the first few of them."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    lines = [line for line in output.splitlines() if line.startswith("=========") and "at " in line]
    return (sum(int(a or b) for a, b in found) if found else None), lines[:5]


def sanitize(work, tool: str) -> None:
    """Runs every op once at tiny shapes under compute-sanitizer, in a process of its own."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        work.emit({"kind": "skip", "item": tool, "reason": "compute-sanitizer is not installed"})
        return
    # The caching allocator would hide accesses beyond a tensor's end inside its own blocks.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--target-processes", "all", sys.executable, "-m", "bench.races"]
    try:
        result = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(work.left / 2 if tool == "memcheck" else work.left, LEAST_S),
        )
    except subprocess.TimeoutExpired as error:
        print(error.stdout)
        work.emit({"kind": "error", "item": tool, "reason": f"not finished after {error.timeout:.0f} s"})
        return
    print(result.stdout, result.stderr)
    errors, lines = parse_sanitizer(result.stdout + result.stderr)
    record = {"kind": "sanitizer", "tool": tool, "errors": errors, "first": lines, "exit_code": result.returncode}
    work.emit(record | {"finished": re.findall(r"ran (\w+)", result.stdout)})


def main() -> None:
    """Every op once, forward and backward, small: the program that compute-sanitizer watches."""
    for op, case in CASES.items():
        _results(case, SHAPES["tiny"], torch.device("cuda"), torch.bfloat16)()
        torch.cuda.synchronize()
        print(f"ran {op}", flush=True)


if __name__ == "__main__":
    main()

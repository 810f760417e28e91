"""Timing. Providers take turns, round after round, so that clocks, heat and neighbours fall on all of them alike.
Before each turn a buffer larger than the last-level cache is overwritten; the median and the 20th and 80th percentile
are kept.

On a GPU the overwrite is long enough for the host to queue the whole turn behind it: what the events enclose is device
time, launch gaps excluded as long as the host is not slower than the device. Inputs are random, never zeros, which a
power-limited chip multiplies faster.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Start = Callable[[], None]
Turn = Callable[[Start], object]  # does its preparations, calls start(), then does what is timed

_FLUSH_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}
_ROUNDS = (3, 200)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one provider's turns."""

    median: float
    p20: float
    p80: float
    rounds: int

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        fifths = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
        return Timing(statistics.median(samples), fifths[0], fifths[3], len(samples))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Clock:
    """Times one turn after another; `samples` are read only after a synchronisation."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple] = []

    def _now(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self, turn: Turn) -> None:
        begun = []
        result = turn(lambda: begun.append(self._now()))
        self._marks.append((begun[-1], self._now()))
        del result  # kept until here: freeing it is not part of the turn

    def samples(self) -> list[float]:
        synchronize(self.device)
        if self.device.type == "cpu":
            return [(end - begin) * 1e3 for begin, end in self._marks]
        return [begin.elapsed_time(end) for begin, end in self._marks]


def interleaved(
    turns: dict[str, Turn], device: torch.device, seconds: float, *, flush: bool = True
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times every turn in round-robin order for about `seconds` in all; once, when `seconds` is 0.

    Returns timings, and for each turn that raised while warming up the reason it has none.
    """
    scratch = torch.empty(_FLUSH_BYTES[device.type] if flush else 0, dtype=torch.uint8, device=device)
    clocks, failed = {}, {}
    for name, turn in turns.items():
        try:
            for _ in range(3):  # compilation, then autograd's and the allocator's second look, then steady state
                clock = _Clock(device)
                clock.take(turn)
                warm = clock.samples()[0]
                if warm * 3 > seconds * 1e3:
                    break
            clocks[name] = _Clock(device)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            assert_alive(device)
    before = time.perf_counter()
    done, planned = 0, _ROUNDS[0] if seconds else 1
    while clocks and done < planned:
        for name, clock in clocks.items():
            scratch.zero_()
            clock.take(turns[name])
        done += 1
        synchronize(device)
        if done == 2:
            per_round = (time.perf_counter() - before) / done
            planned = int(min(max(seconds / per_round, _ROUNDS[0]), _ROUNDS[1]))
    return {name: Timing.of(clock.samples()) for name, clock in clocks.items()}, failed


class DeviceLost(RuntimeError):
    """The CUDA context is gone (an illegal access, say): nothing more can be measured in this process."""


def assert_alive(device: torch.device) -> None:
    """Raises DeviceLost when an earlier failure took the device's context with it; else frees what it left behind."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error
        torch.cuda.empty_cache()


def peak_extra_bytes(run: Callable[[], tuple[Tensor, ...]], device: torch.device) -> int | None:
    """Bytes allocated at the peak of `run`, beyond what was there before and what it returns; None on a CPU."""
    if device.type == "cpu":
        return None
    run()
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = run()
    synchronize(device)
    kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}.values())
    return torch.cuda.max_memory_allocated(device) - before - kept


def as_graph(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`function` captured as one CUDA graph, its replay returning the same tensor each time; itself on a CPU."""
    if device.type == "cpu":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to reach, in the run its percentages come from."""

    copy_bytes_per_s: float  # bytes read plus bytes written
    matmul_flops_per_s: float

    def floor_ms(self, flops: float, moved: float) -> float:
        """No version runs much faster than this: the larger of its arithmetic's time and its traffic's."""
        return 1e3 * max(flops / self.matmul_flops_per_s, moved / self.copy_bytes_per_s)


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, *, edge: int, copy_bytes: int, seconds: float
) -> Ceilings:
    """Copy bandwidth over `copy_bytes`, and a square matrix product of `edge` in `dtype` through torch.mm."""
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    turns = {
        "copy": lambda start: (start(), target.copy_(source)),
        "matmul": lambda start: (start(), torch.mm(a, b, out=out)),
    }
    timings, failed = interleaved(turns, device, seconds, flush=device.type == "cuda")
    if failed:
        raise RuntimeError(f"ceilings: {failed}")
    return Ceilings(
        copy_bytes_per_s=2 * copy_bytes / timings["copy"].median * 1e3,
        matmul_flops_per_s=2 * edge**3 / timings["matmul"].median * 1e3,
    )


def gpu_state() -> str | None:
    """One line of nvidia-smi: clocks, power, temperature, what holds the clocks down. None where there is none."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_throttle_reasons.active"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    names, values = (line.split(", ") for line in lines[:2])
    return "; ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def commit() -> str:
    """The commit measured: BENCH_COMMIT where a tree travels without its history, else git's word, else "unknown"."""
    if os.environ.get("BENCH_COMMIT"):
        return os.environ["BENCH_COMMIT"]
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        root = Path(__file__).parent
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _instructions() -> str:
    """The vector instructions torch uses, which the machine or ATEN_CPU_CAPABILITY and its kin limit."""
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.cpu.get_cpu_capability() + (" with bf16 products" if bf16 else "")


def environment(device: torch.device) -> dict[str, object]:
    """Everything a figure must carry to mean something."""
    facts = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "device": f"{_cpu_name()}, {_instructions()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "state": gpu_state(),
        }
    return facts

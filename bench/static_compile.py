"""Compiles the kernels of a case without a GPU, in worker processes, and keeps what came out.

The launcher runs on empty CPU tensors while `JITFunction.run` is replaced: the arguments, their specialisation, the
grid and the launch options are those of a real launch. A compiler crash takes a worker with it and becomes that job's
result. Results are cached by what they depend on: kernel sources, arguments, architecture, Triton version.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.cases import SHAPES, Shape
from bench.static_case import Case
from bench.static_cases import OPS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TIMEOUT_S = 240
JOBS_PER_WORKER = 40  # LLVM contexts are not given back
WORKER = ("-m", "bench.static_compile")


@dataclasses.dataclass(frozen=True)
class Job:
    """One config of one case for one architecture and dtype. `config` None is what `_tuning.py` chooses."""

    case: str
    arch: int
    dtype: str
    config: tuple[tuple[str, Any], ...] | None = None

    def __str__(self) -> str:
        chosen = "chosen" if self.config is None else ",".join(f"{k}={v}" for k, v in self.config)
        return f"{self.case}|sm_{self.arch}|{self.dtype}|{chosen}"


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict[str, Any]  # by parameter name; also "grid" and the launch options
    config: dict[str, Any]
    run: Callable[[], Any]  # compiles, launches nothing


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch. `numbers` are its integer arguments, constexprs and options by name."""

    kernel: str
    numbers: dict[str, int | float | bool]
    config: dict[str, Any]
    threads: int
    shared: int
    sass: str
    ttir: str
    ttgir: str  # without the places in the source
    bulk_bytes: int  # what the bulk loads of the innermost loop move in one pass


class CompileError(Exception):
    pass


def find_case(name: str, shape: Shape = SHAPES["phi"]) -> Case:
    """The case called `name` ("op" or "op/part")."""
    for case in OPS[name.partition("/")[0]](shape):
        if case.name == name:
            return case
    raise KeyError(name)


class _Driver:
    """Stands in for the CUDA driver: all the compiler asks is the target."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def forced(case: Case, arch: int | None, config: tuple[tuple[str, Any], ...] | None) -> Iterator[list]:
    """Makes the launcher of `case` see that architecture and config; yields a list of the configs it used."""
    names = (case.chooser, "arch_of", "use_triton", *case.replaced)
    replaced = {name: getattr(case.module, name) for name in names if hasattr(case.module, name)}
    choose, used = replaced[case.chooser], []

    def chosen(*arguments, **keywords):
        used.append(dataclasses.replace(choose(*arguments, **keywords), **dict(config or ())))
        return used[-1]

    for name, function in {**case.replaced, case.chooser: chosen}.items():
        setattr(case.module, name, function)
    if arch is not None:
        case.module.arch_of = lambda device: arch
        case.module.use_triton = lambda x: True
    try:
        yield used
    finally:
        for name, function in replaced.items():
            setattr(case.module, name, function)


def capture(job: Job) -> list[Launch]:
    """The launches of a job, in order, restricted to the kernels its case names."""
    case, dtype, launches = find_case(job.case), DTYPES[job.dtype], []
    original = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        names = self.signature.parameters
        bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
        bound.apply_defaults()
        options = {k: v for k, v in kwargs.items() if k not in names}
        sizes = grid(bound.arguments) if callable(grid) else grid
        programs = sizes[0] * (sizes[1] if len(sizes) > 1 else 1) * (sizes[2] if len(sizes) > 2 else 1)
        arguments = {**bound.arguments, **options, "grid": programs}
        if self.__name__ in case.work:
            compile_it = functools.partial(original, self, *args, grid=grid, warmup=True, **kwargs)
            config = dataclasses.asdict(used[-1]) if used else {}  # not every launch has one
            launches.append(Launch(self, arguments, config, compile_it))

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)  # address space, not memory: nothing touches it

    JITFunction.run = record
    try:
        with forced(case, job.arch, job.config) as used:
            case.launch(case.tensors(new))
    finally:
        JITFunction.run = original
    return launches


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}@{value.data_ptr() % 16}"
    return repr(value)


def key_of(job: Job, launches: list[Launch]) -> str:
    parts = [triton.__version__, str(job.arch), *(field.name for field in dataclasses.fields(Compiled))]
    for launch in launches:
        parts += [launch.kernel.cache_key, *(f"{k}={_describe(v)}" for k, v in launch.arguments.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_tool("cuobjdump"), "-sass", "-res-usage", file.name], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"cuobjdump: {done.stderr.strip().splitlines()[-1]}")
    return re.sub(r"^ +/\* 0x[0-9a-f]{16} \*/\n|/\* 0x[0-9a-f]{16} \*/", "", done.stdout, flags=re.M)


def _bulk_bytes(ttgir: str) -> int:
    """Bytes of the descriptor loads inside the deepest `scf.for` that has any."""
    depths: dict[int, int] = {}
    loops: list[int] = []  # brace depth at which each open loop ends
    braces = 0
    for line in ttgir.splitlines():
        code = line.partition(" loc(")[0]
        if "scf.for" in code:
            loops.append(braces)
        braces += code.count("{") - code.count("}")
        while loops and braces <= loops[-1]:
            loops.pop()
        if "async_tma_copy_global_to_local" in code:
            shape = re.search(r"-> !ttg.memdesc<([\dx]+)x(?:bf16|f16)", code)
            size = 2
            for extent in shape[1].split("x"):
                size *= int(extent)
            depths[len(loops)] = depths.get(len(loops), 0) + size
    deepest = max(depths, default=0)
    return depths[deepest] if deepest else 0


def compile_job(job: Job) -> list[Compiled]:
    """Compiles in this process; returns what came out, one for each launch."""
    triton.runtime.driver.set_active(_Driver(job.arch))
    launches = capture(job)
    out = []
    for launch in launches:
        kernel = launch.run()
        threads = re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])
        out.append(
            Compiled(
                kernel=launch.kernel.__name__,
                numbers={k: v for k, v in launch.arguments.items() if isinstance(v, (int, float))},
                config=launch.config,
                threads=int(threads[1]),
                shared=kernel.metadata.shared,
                sass=_disassemble(kernel.asm["cubin"]),
                ttir=kernel.asm["ttir"],
                ttgir=re.sub(r" loc\(.*", "", kernel.asm["ttgir"]),
                bulk_bytes=_bulk_bytes(kernel.asm["ttgir"]),
            )
        )
    return out


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xiangxin-fast" / "static"


def _load(path: Path) -> list[Compiled] | CompileError | None:
    try:
        held = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError):
        return None
    return CompileError(held) if isinstance(held, str) else [Compiled(**c) for c in held]


def _save(path: Path, result: list[Compiled] | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    held = result if isinstance(result, str) else [dataclasses.asdict(c) for c in result]
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(gzip.compress(json.dumps(held).encode(), 3))
    temporary.replace(path)


class _Worker:
    """A process that compiles one job after another; a new one takes its place when it dies or hangs."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.jobs = 0
        self.scratch = tempfile.TemporaryDirectory(prefix="xiangxin-static-")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self.jobs = 0

    def _start(self) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": self.scratch.name, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        return subprocess.Popen(
            [sys.executable, *WORKER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def run(self, job: Job, path: Path) -> list[Compiled] | CompileError:
        if self.process is None or self.jobs == JOBS_PER_WORKER:
            self.close()
            self.process = self._start()
        self.jobs += 1
        watch = threading.Timer(TIMEOUT_S, self.process.kill)
        watch.start()
        try:
            self.process.stdin.write(json.dumps([dataclasses.asdict(job), str(path)]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        watch.cancel()
        if answer:
            return _load(path) or CompileError("the compiled kernel could not be read back from the cache")
        code = self.process.wait()
        self.close()
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return CompileError(f"the compiler died ({what})")


def compile_all(
    jobs: list[Job], workers: int = 2, done: Callable[[Job], None] = lambda job: None
) -> dict[Job, list[Compiled] | CompileError]:
    """Every job's kernels, or the CompileError that says why there are none; `done` is called as each finishes."""
    results: dict[Job, list[Compiled] | CompileError] = {}
    missing: list[tuple[Job, Path]] = []
    for job in jobs:
        launches = capture(job)
        path = cache_dir() / f"{key_of(job, launches)}.json.gz"
        held = _load(path)
        if held is None:
            missing.append((job, path))
        else:
            results[job] = held
            done(job)
    local, pool = threading.local(), []

    def one(job: Job, path: Path) -> None:
        if not hasattr(local, "worker"):
            local.worker = _Worker()
            pool.append(local.worker)
        results[job] = local.worker.run(job, path)
        done(job)

    try:
        with ThreadPoolExecutor(workers) as threads:
            for future in [threads.submit(one, job, path) for job, path in missing]:
                future.result()
    finally:
        for worker in pool:
            worker.close()
            worker.scratch.cleanup()
    return {job: results[job] for job in jobs}


def _serve() -> None:
    """The worker: a job and a path a line on stdin, an answer a line on stdout once the result is in the cache."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the compiler prints must not be taken for an answer
    for line in sys.stdin:
        fields, path = json.loads(line)
        config = fields.pop("config")
        job = Job(**fields, config=config and tuple((k, v) for k, v in config))
        try:
            result = compile_job(job)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            result = f"{type(error).__name__}: {lines[0][:300]}"
        _save(Path(path), result)
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    _serve()

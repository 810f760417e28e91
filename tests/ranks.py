"""Several ranks on gloo for tests, each a process, without torchrun.

They are forked from one process that has imported torch already, so that starting four takes a tenth of a second; each
runs a function of this package by its name, and can be killed like any other process.
"""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks_preload"])


class Ended(NamedTuple):
    """How a rank ended: its exit code (negative: the signal that killed it), what it returned, what it raised."""

    code: int
    value: object
    error: str | None


class Started:
    """Ranks that run; `wait` for them."""

    def __init__(
        self, size: int, function: Callable, arguments: tuple, environment: dict[str, str], stderr: Path | None
    ):
        self._store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"  # for the process that they are forked from
        self.processes, self._pipes = [], []
        for rank in range(size):
            receiver, sender = _context.Pipe(duplex=False)
            variables = {
                "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port, "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            variables = {name: str(value) for name, value in variables.items()} | environment
            log = stderr and str(stderr / f"rank{rank}.err")
            process = _context.Process(target=_main, args=(sender, variables, log, function, arguments), daemon=True)
            process.start()
            sender.close()
            self.processes.append(process)
            self._pipes.append(receiver)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to a rank, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float = TIMEOUT) -> list[Ended]:
        """How each rank ended. Those still there after `timeout` seconds are killed, and AssertionError says so."""
        end = time.monotonic() + timeout
        values: dict[int, tuple] = {}
        open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while open_pipes and time.monotonic() < end:
            for pipe in wait(list(open_pipes), timeout=max(0.0, end - time.monotonic())):
                rank = open_pipes.pop(pipe)
                try:
                    values[rank] = pipe.recv()
                except EOFError:
                    values[rank] = (None, None)
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in late:
            self.processes[rank].kill()
            self.processes[rank].join()
        assert not late, f"ranks {late} were still there after {timeout} s"
        return [Ended(process.exitcode, *values[rank]) for rank, process in enumerate(self.processes)]


def start(
    size: int, function: Callable, *arguments, environment: dict[str, str] | None = None, stderr: Path | None = None
) -> Started:
    """Calls `function(*arguments)` in `size` processes with torchrun's variables and those of `environment`.

    `function` and `arguments` must be importable and picklable. `stderr`: a directory for rank<r>.err.
    """
    return Started(size, function, arguments, environment or {}, stderr)


def run(size: int, function: Callable, *arguments, timeout: float = TIMEOUT, **options) -> list:
    """`start`, then what each rank returned. AssertionError with the traceback of one that did not return."""
    ended = start(size, function, *arguments, **options).wait(timeout)
    for rank, end in enumerate(ended):
        assert end.code == 0, f"rank {rank} ended with {end.code}: {end.error}"
    return [end.value for end in ended]


def _main(sender: Connection, variables: dict[str, str], log: str | None, function: Callable, arguments: tuple) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    if log:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 2)
    try:
        value = function(*arguments)
    except BaseException as error:
        sender.send((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        os._exit(1)
    sender.send((value, None))
    sender.close()
    os._exit(0)

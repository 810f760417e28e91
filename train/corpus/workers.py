"""Processes that carry out independent tasks, with one progress bar over their bytes.

A task's result is a file that appears under its name when it is whole, so a run that is killed goes on where it was.
Processes are spawned, not forked (threads do not survive a fork), import no torch, and end with their parent.
"""

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from xiangxin_fast.errors import InputError

console = Console(stderr=True)
Advance = Callable[[int], None]  # so many more bytes are done
Task = tuple  # the function's arguments after `advance`

LOCKS = ("run.lock", "workers.lock")
SMALL_BYTES = 4 << 20  # done before another process has started

_advance: Advance
_held: object  # keeps the lock file open


def progress() -> Progress:
    """Bytes done, bytes a second and the time left."""
    label = TextColumn("{task.description}")
    return Progress(label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console)


class Lock:
    """Keeps a second run out of `directory`, and out of it until the processes of one that was killed have ended."""

    def __init__(self, directory: Path):
        self._run = (directory / LOCKS[0]).open("w")
        try:
            fcntl.flock(self._run, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{directory}: expected no other run at work in it, found one") from None
        with (directory / LOCKS[1]).open("w") as workers:
            fcntl.flock(workers, fcntl.LOCK_EX)

    def release(self) -> None:
        self._run.close()


def _begin(lock: Path, done) -> None:
    global _advance, _held
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _held = lock.open("w")
    fcntl.flock(_held, fcntl.LOCK_SH)

    def _advance(count: int) -> None:
        with done.get_lock():
            done.value += count


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _carry_out(function: Callable, task: Task):
    return function(_advance, *task)


def run(
    title: str, function: Callable, tasks: list[Task], total: int, behind: int, count: int, directory: Path
) -> list:
    """`function(advance, *task)` for each task, in at most `count` processes; what they return, in the tasks' order.

    `total` bytes make the progress bar full and `behind` of them are done already. One task, little to do or one
    process: this one does it. The first error ends the others.
    """
    with progress() as bar:
        shown = bar.add_task(title, total=max(total, 1), completed=behind)
        if min(count, len(tasks)) <= 1 or total - behind < SMALL_BYTES:
            results = [function(lambda size: bar.advance(shown, size), *task) for task in tasks]
        else:
            results = _run_in_processes(
                function, tasks, count, directory, lambda size: bar.update(shown, completed=behind + size)
            )
        bar.update(shown, completed=max(total, 1))
    return results


def _run_in_processes(function: Callable, tasks: list[Task], count: int, directory: Path, show: Advance) -> list:
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    processes = min(count, len(tasks))
    threads = {"RAYON_NUM_THREADS": str(max(1, count // processes)), "TOKENIZERS_PARALLELISM": "true"}
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(threads)
    pool = ProcessPoolExecutor(processes, context, _begin, (directory / LOCKS[1], done))
    try:
        futures = [pool.submit(_carry_out, function, task) for task in tasks]
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            show(done.value)
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise InputError("a process ended before its time (out of memory?): run the same command again") from None
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

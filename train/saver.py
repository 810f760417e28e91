"""Saver: writes checkpoints in a thread, while training goes on, from copies made before it does."""

import threading
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from xiangxin_fast.errors import InputError

from . import checkpoint
from .failpoints import reach
from .parallel import Ranks, host_copies, use_device


class Saver:
    """Checkpoints of one run: one is written at a time, and the copies are made into the same memory each time."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks, waiting: Callable[[], None] = lambda: None):
        """`waiting` is called each second while a call waits for a checkpoint, which on slow disks takes minutes."""
        self._folder, self._keep, self._ranks, self._waiting = folder, keep, ranks, waiting
        self._copies: dict[str, Tensor] | None = None
        self._thread: threading.Thread | None = None
        self._step, self._failure = 0, None

    def begin(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Copies `tensors` to the host, then writes them and `state` in the thread. Waits for the one before first.

        All ranks call it, at the same step, with a `state` that nothing else changes.
        """
        self._join()
        self._copies = host_copies(tensors, self._ranks, into=self._copies)
        reach("copied", self._ranks.rank)
        self._step, self._failure = state["step"], None
        self._thread = threading.Thread(target=self._write, args=(self._copies, state), name="saver", daemon=True)
        self._thread.start()

    def outcome(self, wait: bool = False) -> tuple[int, str | None] | None:
        """Step and failure (None: saved) of a checkpoint whose writing has ended since the last call; else None."""
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._join()
        return self._step, self._failure

    def _join(self) -> None:
        if self._thread is not None:
            while self._thread.is_alive():
                self._waiting()
                self._thread.join(1.0)
            self._thread = None

    def _write(self, tensors: dict[str, Tensor], state: dict) -> None:
        use_device(self._ranks)
        try:
            checkpoint.save(self._folder, tensors, state, self._ranks.saving)
        except (InputError, OSError, RuntimeError) as error:  # RuntimeError: a rank that is gone
            self._failure = " ".join(str(error).split())
            return
        if self._ranks.rank == 0:
            checkpoint.prune(self._folder, self._keep)  # what cannot be deleted stays

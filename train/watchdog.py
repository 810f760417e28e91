"""A rank that is dead or stuck ends the run in bounded time, and is named.

Every rank has a thread that, each second, writes a line about itself to the store of torchrun, and reads those of the
others. A rank whose line stands still is dead, one whose line goes on but whose loop does not is stuck. Collectives do
not tell: with NCCL the others just wait, with gloo some fail and some wait, and none knows for whom.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from xiangxin_fast.errors import InputError

from .parallel import PATIENCE_WITH_DISKS, Ranks, first_to_say, place

INTERVAL = 1.0  # seconds between looks
# Seconds without a sign; a thread can be kept from running by what holds the interpreter. After a death torchrun kills
# the other ranks in 30 seconds: by then they must have named the dead one.
DEAD = 20.0
DEAD_AFTER_ERROR = 5.0  # the same, once a collective has failed: then some rank is gone
EXIT_CODE = 3  # of a rank that ends because of another


class RankLost(InputError):
    """Another rank is gone; the message names it, with its last words where it had any."""


class Watchdog(threading.Thread):
    """Watches the other ranks from `start` on. The loop calls `progress` as it goes, and `leave` when it ends."""

    def __init__(self, ranks: Ranks, timeout: float):
        """`timeout`: seconds without progress of this rank's loop after which the run ends."""
        super().__init__(name="watchdog", daemon=True)
        self._ranks, self._timeout, self._limit = ranks, timeout, timeout
        self._store = ranks.store.clone() if ranks.size > 1 else None  # its own connection: the other may wait for long
        self._beats, self._steps, self._last_words = 0, 0, ""
        self._lines = [""] * ranks.size
        now = time.monotonic()
        self._changed, self._progressed = [now] * ranks.size, now
        self._over = threading.Event()

    def start(self) -> None:
        """Begins to watch; where there is one rank there is nothing to."""
        if self._store is not None:
            self._look()
            super().start()

    def progress(self) -> None:
        """Says that the loop goes on."""
        self._steps += 1
        self._progressed = time.monotonic()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Around reading or writing a whole model, which on slow disks takes long without a sign of progress."""
        self._limit = PATIENCE_WITH_DISKS * self._timeout
        try:
            yield
        finally:
            self._progressed = time.monotonic()
            self._limit = self._timeout

    def leave(self, last_words: str = "left") -> None:
        """Says that this rank ends, and why: the others do not call it dead."""
        if self._store is not None and not self._over.is_set():
            self._over.set()
            self.join()
            self._last_words = last_words
            with suppress(RuntimeError):  # the store may be what is gone
                self._write()

    def explain(self) -> RankLost | None:
        """Who is gone, asked after a collective has failed; None where all are there."""
        end = time.monotonic() + DEAD_AFTER_ERROR + 3 * INTERVAL
        while self._store is not None and time.monotonic() < end:
            if lost := self._lost(DEAD_AFTER_ERROR):
                return lost
            time.sleep(INTERVAL / 4)
        return None

    def run(self) -> None:
        while not self._over.wait(INTERVAL):
            try:
                self._look()
                problem = self._lost(DEAD) or self._stuck()
            except RuntimeError as error:  # what the store raises
                problem = RankLost(f"the store of this run is gone: {' '.join(str(error).split())}")
            if problem and not self._over.wait(2 * INTERVAL):  # unless the loop, too, has noticed
                if first_to_say(RankLost.__name__, self._store):
                    with suppress(OSError):  # who read it may be gone
                        print(f"error: {problem}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)

    def _look(self) -> None:
        self._beats += 1
        self._write()
        keys = [_key(rank) for rank in range(self._ranks.size)]
        if not self._store.check(keys):
            return  # not all have begun; joining has a time limit of its own
        for rank, line in enumerate(self._store.multi_get(keys)):
            line = line.decode()
            if line != self._lines[rank]:
                self._lines[rank], self._changed[rank] = line, time.monotonic()

    def _write(self) -> None:
        line = "|".join((str(self._beats), str(self._steps), place(), self._last_words))
        self._store.set(_key(self._ranks.rank), line)

    def _lost(self, silence: float) -> RankLost | None:
        now = time.monotonic()
        for rank, line in enumerate(self._lines):
            if not line or rank == self._ranks.rank:
                continue
            _, steps, where, last_words = line.split("|", 3)
            if last_words and last_words != "left":
                return RankLost(f"rank {rank} ({where}) ended: {last_words}")
            if not last_words and now - self._changed[rank] > silence:
                return RankLost(
                    f"rank {rank} ({where}) gave no sign for {now - self._changed[rank]:.0f} s, after {steps} steps: "
                    "it died, or its node or connection did; the same command goes on from the newest checkpoint"
                )
        return None

    def _stuck(self) -> RankLost | None:
        limit = self._limit
        if time.monotonic() - self._progressed < limit:
            return None
        steps = {rank: int(line.split("|", 2)[1]) for rank, line in enumerate(self._lines) if line}
        last = [rank for rank, count in steps.items() if count == min(steps.values())]
        return RankLost(
            f"no progress for {limit:.0f} s (--timeout {self._timeout:g}); "
            f"furthest behind, after {steps[last[0]]} steps: "
            + ", ".join(f"rank {rank} ({self._lines[rank].split('|')[2]})" for rank in last)
        )


def _key(rank: int) -> str:
    return f"watchdog/{rank}"

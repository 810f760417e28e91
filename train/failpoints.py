"""Named moments at which a test can have a process killed, or a write fail: proof of what a crash there leaves.

XIANGXIN_FAILPOINT=NAME:RANK:COUNT:ACTION makes rank RANK do ACTION when it comes to NAME for the COUNT-th time: `kill`
ends it as kill -9 does, `enospc` raises what a full disk does. Unset, `reach` does nothing.
"""

import errno
import os
import signal
from collections import Counter

_reached: Counter[str] = Counter()


def reach(name: str, rank: int) -> None:
    """Says that this process has come to the moment called `name`."""
    wanted = os.environ.get("XIANGXIN_FAILPOINT")
    if wanted is None or not wanted.startswith(f"{name}:{rank}:"):
        return
    _reached[name] += 1
    _, _, count, action = wanted.split(":")
    if _reached[name] == int(count):
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected at {name})")

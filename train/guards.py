"""Guards: what a run does about losses that are not finite, or that jump, and about checkpoints that are not written.
Pure host code over the steps' records.

Updates whose loss or gradient is not finite are left out on the device, by all ranks alike, before any of this runs;
Guards counts them and ends the run when they do not stop. A spike is a loss far above those before it, several steps in
a row: one bad batch is no spike. PaLM's runs (arXiv:2204.02311, section 5.1) had about 20 spikes, and went on from some
100 steps before without the batches in between, which did no harm when seen from another state.
"""

import math
from dataclasses import dataclass, field
from statistics import median

from xiangxin_fast.errors import InputError

WINDOW = 128  # losses that a new one is held against
ENOUGH = 32  # of them before anything is judged
SIGMAS = 6.0  # above what they lead to expect, in standard deviations as their median absolute deviation estimates it
RISE = 0.05  # and at least this part of it above it: a flat curve deviates by next to nothing
PATIENCE = 3  # steps in a row
SIGMA_PER_MAD = 1.4826  # of a normal distribution
MOST_UNSAVED = (
    3  # checkpoints in a row that could not be written: what trains on for longer is lost with the next fault
)


class NotSaved(InputError):
    """Training stops since its checkpoints cannot be written, of which a disk is the reason, and no option."""

    EXIT_CODE = 4


@dataclass
class Guards:
    """The state of the guards, in JSON values: part of every checkpoint, so that a resumed run judges alike."""

    losses: list[float] = field(default_factory=list)  # the last WINDOW that were no outliers
    high: int = 0  # outliers in a row until now
    skipped: int = 0  # updates left out in a row until now

    def judge(self, step: int, loss: float, norm: float, most_skipped: int) -> bool:
        """Takes in the newest step; whether a spike is complete with it, after which losses are judged anew.

        InputError where the last `most_skipped` updates were all left out.
        """
        if not math.isfinite(loss + norm):
            self.skipped += 1
            if self.skipped >= most_skipped:
                raise InputError(
                    f"training: expected a finite loss and gradient, got none in steps {step - self.skipped + 1} to "
                    f"{step}, the last with loss {loss}, gradient norm {norm}: no parameter was changed by them; go on "
                    "from the newest checkpoint with a lower --lr, or look at the samples that events.jsonl names"
                )
            return False
        self.skipped = 0
        if not self._is_high(loss):
            self.high = 0
            self.losses = [*self.losses, loss][-WINDOW:]
            return False
        self.high += 1
        if self.high < PATIENCE:
            return False
        self.high, self.losses = 0, []
        return True

    def _is_high(self, loss: float) -> bool:
        if len(self.losses) < ENOUGH:
            return False
        half = len(self.losses) // 2
        # Losses fall: without its slope, taken between the medians of its halves, a curve would hide what rises less.
        slope = min(0.0, (median(self.losses[-half:]) - median(self.losses[:half])) / (len(self.losses) - half))
        now = [value + slope * (len(self.losses) - i) for i, value in enumerate(self.losses)]
        middle = median(now)
        deviation = SIGMA_PER_MAD * median(abs(value - middle) for value in now)
        return loss > middle + max(SIGMAS * deviation, RISE * middle)

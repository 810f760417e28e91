"""What tests have ranks do: functions that processes of tests/ranks.py import by name."""

import sys

from train import loop
from train.config import TrainConfig


def trained(config: TrainConfig) -> int:
    """A whole run; its last step."""
    sys.stderr.flush()
    return loop.train(config).step

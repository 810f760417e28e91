"""Where this process stands among those that train: the only file of the trainer that knows of ranks."""

import os

import torch

from xiangxin_fast.errors import InputError


def join() -> torch.device:
    """The device this process computes on. InputError where torchrun started more than one process."""
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise InputError(f"training: expected one process, got WORLD_SIZE={size}: give torchrun --nproc_per_node=1")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""What the process that ranks are forked from imports: all that a run needs, so that each fork has it."""

import torch

import train.loop  # noqa: F401

torch.set_num_threads(1)

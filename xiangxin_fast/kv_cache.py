"""KVCache: the keys and values of every layer, allocated once."""

import torch

from .config import PhiConfig


class KVCache:
    """k, v [L, B, S, H, D]: keys as `parallel_block` stores them (rotated, pairs neighbouring) and values."""

    def __init__(self, config: PhiConfig, rows: int, positions: int, *, device=None, dtype=None):
        shape = (config.layers, rows, positions, config.heads, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def positions(self) -> int:
        return self.k.shape[2]

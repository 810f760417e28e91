"""KVCache: the keys and values of every layer, allocated once."""

import torch
from torch import Tensor

from .config import PhiConfig

# Positions are rounded up to this many, so that every row begins on a cache line in every dtype: the bits that a CPU's
# library kernels give may depend on where their inputs lie.
ALIGNMENT = 32


class KVCache:
    """k, v [L, B, S, H, D]: keys as `parallel_block` stores them (rotated, pairs neighbouring) and values."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v

    @staticmethod
    def allocate(config: PhiConfig, rows: int, positions: int, *, device=None, dtype=None) -> "KVCache":
        """Room for `rows` sequences of at least `positions` tokens; nothing is read before it is written."""
        positions = -(-positions // ALIGNMENT) * ALIGNMENT
        shape = (config.layers, rows, positions, config.heads, config.head_dim)
        return KVCache(*(torch.empty(shape, device=device, dtype=dtype) for _ in "kv"))

    def rows(self, start: int, stop: int) -> "KVCache":
        """Rows start..stop-1 of this cache, in the same memory."""
        return KVCache(self.k[:, start:stop], self.v[:, start:stop])

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one row to another."""
        for cache in (self.k, self.v):
            cache[:, target, :length] = cache[:, source, :length]

    @property
    def positions(self) -> int:
        return self.k.shape[2]

"""KVCache: the keys and values of every layer, allocated once."""

import os

import torch
from torch import Tensor

from .config import PhiConfig
from .errors import InputError

# Positions are rounded up to this many, so that every row begins on a cache line in every dtype: the bits that a CPU's
# library kernels give may depend on where their inputs lie.
ALIGNMENT = 32


class KVCache:
    """k, v [L, B, S, H, D]: keys as `parallel_block` stores them (rotated, pairs neighbouring) and values."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v

    @staticmethod
    def allocate(
        config: PhiConfig, rows: int, positions: int, *, device=None, dtype=None, weights: int = 0
    ) -> "KVCache":
        """Room for `rows` sequences of at least `positions` tokens; nothing is read before it is written.

        InputError where memory is short: how much is needed, beside `weights` bytes that are already there, how much is
        free, and what would fit.
        """
        positions = -(-positions // ALIGNMENT) * ALIGNMENT
        shape = (config.layers, rows, positions, config.heads, config.head_dim)
        try:
            return KVCache(*(torch.empty(shape, device=device, dtype=dtype) for _ in "kv"))
        except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's allocator has no class of its own
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
        # Out of the handler: the error holds on to the half that was allocated.
        device, dtype = torch.device(device or "cpu"), dtype or torch.get_default_dtype()
        free, position = free_bytes(device), 2 * config.layers * config.channels * dtype.itemsize
        raise InputError(
            f"KV cache: {rows} rows of {positions} tokens need {_gb(rows * positions * position)} beside "
            f"{_gb(weights)} of weights, got {_gb(free)} free on {device}: {free // (positions * position)} rows of "
            f"{positions} tokens or {rows} rows of {free // (rows * position)} would fit"
        )

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


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that an allocation may still get, what torch holds for reuse included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"

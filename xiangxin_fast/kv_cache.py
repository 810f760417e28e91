"""KVCache: the keys and values of every layer, allocated once."""

import torch
from torch import Tensor

from .config import PhiConfig
from .errors import InputError
from .memory import free_bytes, gigabytes, lacks_memory

# Positions are rounded up to this many, so that every row begins on a cache line in every dtype: the bits that a CPU's
# library kernels give may depend on where their inputs lie.
ALIGNMENT = 32


class KVCache:
    """k, v [L, B, S, H, D]: keys as `parallel_block` stores them (rotated, pairs neighbouring) and values."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v

    @staticmethod
    def allocate(
        config: PhiConfig, rows: int, positions: int, *, device=None, dtype=None, weights: int = 0, working: int = 0
    ) -> "KVCache":
        """Room for `rows` sequences of at least `positions` tokens; nothing is read before it is written.

        InputError where memory is short, as `too_little_memory` tells it.
        """
        positions = -(-positions // ALIGNMENT) * ALIGNMENT
        device, dtype = torch.device(device or "cpu"), dtype or torch.get_default_dtype()
        shape = (config.layers, rows, positions, config.heads, config.head_dim)
        try:
            return KVCache(*(torch.empty(shape, device=device, dtype=dtype) for _ in "kv"))
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
        # Out of the handler: the error holds on to the half that was allocated.
        needed = {"weights": weights, "working": working}
        raise too_little_memory(config, rows, positions, device, dtype, free_bytes(device), **needed)

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


def too_little_memory(
    config: PhiConfig,
    rows: int,
    positions: int,
    device: torch.device,
    dtype: torch.dtype,
    free: int,
    *,
    weights: int = 0,
    working: int = 0,
) -> InputError:
    """`rows` sequences of `positions` tokens did not fit: what they need, and what would do with less.

    `free`: bytes there are for the cache and for `working` bytes to compute in, beside `weights` bytes that are there.
    """
    position = 2 * config.layers * config.channels * dtype.itemsize
    left = max(free - working, 0)
    fewer = min(left // (positions * position), rows - 1)
    shorter = min(left // (rows * position), positions - 1) // ALIGNMENT * ALIGNMENT
    fits = [f"{fewer} rows of {positions} tokens"] * (fewer > 0) + [f"{rows} rows of {shorter}"] * (shorter > 0)
    return InputError(
        f"KV cache: {rows} rows of {positions} tokens need {gigabytes(rows * positions * position)}, and about "
        f"{gigabytes(working)} to compute in, beside {gigabytes(weights)} of weights, got {gigabytes(free)} free on "
        f"{device}: {' or '.join(fits) or 'nothing of that size'} would fit"
    )

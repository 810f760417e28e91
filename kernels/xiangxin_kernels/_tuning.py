"""Launch configs: per op one frozen dataclass of constexprs and launch sizes, its rows, and a pure `choose_<op>`.

    choose_<op>(shape..., dtype, arch) -> <Op>Config        asks no device, times nothing: same arguments, same config

Rows are keyed by architecture: 80 (A100, A800) or 90 (H100, H800, H200). `python -m bench.tune` measures candidates on
a GPU and prints rows to paste here; `python -m bench.static` compiles them without one. A comment at each row says
where it comes from: "measured <device>, torch, triton, date", or "static" (picked by bench.static, not yet measured).
"""

import functools
from dataclasses import dataclass

import torch

ARCHS = (80, 90)


@functools.cache
def arch_of(device: torch.device) -> int:
    """The architecture whose rows serve `device`: 90 from compute capability 9.0 on, 80 below it and off CUDA."""
    return 90 if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else 80


@dataclass(frozen=True)
class CrossEntropyConfig:
    """One program a row of logits, BLOCK_V columns at a time."""

    block_v: int
    num_warps: int


def choose_cross_entropy(V: int, dtype: torch.dtype, arch: int) -> CrossEntropyConfig:
    """Static: 16 columns a thread keep two 128-bit loads in flight; a short row takes one block."""
    return CrossEntropyConfig(block_v=min(4096, max(16, 1 << (V - 1).bit_length())), num_warps=8 if V > 1024 else 4)

"""The GPUs that the project knows: what utilisation is counted against, and what plans and rooflines are made with.

Datasheets of the SXM boards and whitepapers: NVIDIA A100 Tensor Core GPU Architecture (2020), 312 TFLOP/s dense bf16 on
108 SMs; H100 Tensor Core GPU Architecture (2022), 989.4 on 132. Boards of the same chips for PCIe, or with less memory,
are slower and not here.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Datasheet figures of one board, and the best dense bf16 product published for it."""

    called: str  # by its driver
    arch: int
    sms: int
    memory: int  # bytes
    flops: float  # dense bf16, FLOP/s
    bandwidth: float  # bytes/s
    nvlink: float  # bytes/s, both directions together
    best_product: float  # FLOP/s; github.com/stas00/ml-engineering, "maximum achievable matmul FLOPS", 2025


GPUS = {
    "A800-80G": Gpu("NVIDIA A800-SXM4-80GB", 80, 108, 80 * GIB, 312e12, 2.04e12, 400e9, 271.2e12),
    "A100-80G": Gpu("NVIDIA A100-SXM4-80GB", 80, 108, 80 * GIB, 312e12, 2.04e12, 600e9, 271.2e12),
    "H100": Gpu("NVIDIA H100 80GB HBM3", 90, 132, 80 * GIB, 989.4e12, 3.35e12, 900e9, 794.5e12),
    "H200": Gpu("NVIDIA H200", 90, 132, 141 * 10**9, 989.4e12, 4.8e12, 900e9, 794.5e12),
}


def gpu_called(device: str) -> Gpu | None:
    """The GPU that its driver calls `device`; None for any other: its peak is not guessed."""
    return next((gpu for gpu in GPUS.values() if gpu.called == device), None)

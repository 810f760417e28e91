"""The GPUs that the trainer knows: what utilisation is counted against and plans are made with."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Datasheet figures of one board, and the best dense bf16 product published for it."""

    arch: int
    memory: int  # bytes
    flops: float  # dense bf16, FLOP/s
    bandwidth: float  # bytes/s
    nvlink: float  # bytes/s, both directions together
    best_product: float  # FLOP/s; github.com/stas00/ml-engineering, "maximum achievable matmul FLOPS", 2025


GPUS = {
    "A800-80G": Gpu(80, 80 * GIB, 312e12, 2.04e12, 400e9, 271.2e12),
    "A100-80G": Gpu(80, 80 * GIB, 312e12, 2.04e12, 600e9, 271.2e12),
    "H100": Gpu(90, 80 * GIB, 989e12, 3.35e12, 900e9, 794.5e12),
    "H200": Gpu(90, 141 * 10**9, 989e12, 4.8e12, 900e9, 794.5e12),
}


def gpu_called(device: str) -> Gpu | None:
    """The GPU of the table whose name the driver's `device` name contains ("NVIDIA A800-SXM4-80GB"), else None."""
    return next((gpu for name, gpu in GPUS.items() if name.partition("-")[0] in device), None)

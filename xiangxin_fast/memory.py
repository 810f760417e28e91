"""How much memory is left, and how its lack is recognised."""

import os

import torch

# What says that memory is short: CUDA and Triton, cuBLAS, and torch on a CPU, none of which has a class for it.
COMPLAINTS = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that an allocation may still get, what torch holds for reuse included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def lacks_memory(error: BaseException | None) -> bool:
    """Whether `error`, or one that it followed, says that memory is short.

    A graph that cannot be captured for lack of it ends in an error about the capture.
    """
    while error is not None:
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and any(c in str(error) for c in COMPLAINTS)
        ):
            return True
        error = error.__context__
    return False


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"

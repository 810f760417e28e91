"""safetensors files: read and written one tensor at a time, and read as if they came from anyone.

The safetensors library checks how a file is laid out. What it lets pass is checked here: names given twice, and headers
far larger than a Phi needs.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InputError
from .strict_files import MIB, parse_json

HEADER_LIMIT = 4 * MIB  # phi-2's header has 50 KB
TENSOR_LIMIT = 10_000  # phi-2 has 453 tensors
FLOAT_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPE_NAMES = FLOAT_NAMES | {torch.int8: "I8", torch.uint8: "U8"}


class SafetensorsFile:
    """A safetensors file open for reading; `tensors` maps each name to its dtype, as the file spells it, and shape."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > HEADER_LIMIT:
                    raise InputError(f"{path}: expected a header of at most {HEADER_LIMIT} bytes, got {length}")
                header = parse_json(file.read(length), f"{path} (header)")
            header.pop("__metadata__", None)
            if len(header) > TENSOR_LIMIT:
                raise InputError(f"{path}: expected at most {TENSOR_LIMIT} tensors, got {len(header)}")
            # The default backend maps the file: one that shrank while it was read would kill the process by SIGBUS.
            self._file = safe_open(path, "pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: expected a whole safetensors file, got: {_one_line(error)}") from None
        self.tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own."""
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path}: tensor {name!r} cannot be read: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def write_safetensors(
    path: Path, entries: dict[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[Tensor]
) -> None:
    """Writes `tensors` as they come, of the names, dtypes and shapes in `entries`; on the disk on return.

    The library's save_file wants them all in memory at once, and leaves a file that nobody but its owner may read.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # without it transformers 4 refuses the file
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, tensor in zip(entries.values(), tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == entry, (tensor.dtype, tensor.shape, entry)
            file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())

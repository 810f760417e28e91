"""A model directory as the command line wants it: tokenizer and shape at once, the weights when they are needed."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xiangxin_fast.checkpoint import load_pretrained
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.decode_batch import MAX_ROWS
from xiangxin_fast.errors import InputError
from xiangxin_fast.generator import Generator
from xiangxin_fast.hf_config import Quantization, read_config, read_quantization
from xiangxin_fast.memory import free_bytes
from xiangxin_fast.model import DEFAULT_DTYPE, Phi
from xiangxin_fast.quantization import quantization_of, too_little_for_weights, weight_bytes
from xiangxin_fast.strict_files import file_of
from xiangxin_fast.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .arguments import MachineOptions

MOST_THREADS = 1024  # where the system gives no more of them, OpenMP ends the process


def use_threads(machine: "MachineOptions") -> None:
    if machine.threads is not None:
        if machine.threads > MOST_THREADS:
            raise InputError(f"--threads: expected at most {MOST_THREADS}, got {machine.threads}")
        torch.set_num_threads(machine.threads)


def device_of(machine: "MachineOptions") -> torch.device | None:
    """The device that was named; None for auto. InputError: there is no such device here."""
    if machine.device == "auto":
        return None
    try:
        device = torch.device(machine.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f'--device: expected "auto", "cpu", "cuda" or "cuda:N", got {machine.device!r}')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{machine.device} and {torch.cuda.device_count()} GPUs"
        raise InputError(f"--device: expected a device of this machine, got {found}")
    return device


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(machine: "MachineOptions") -> torch.dtype | None:
    return None if machine.dtype == "auto" else getattr(torch, machine.dtype)


def require_memory(
    config: PhiConfig,
    device: torch.device | None,
    dtype: torch.dtype | None,
    quantize: str | None,
    recorded: Quantization | None = None,
) -> None:
    """InputError where a GPU has too little memory for the weights: what they need, and what would fit.

    `recorded`: how they are rounded already.
    """
    device, dtype = device or default_device(), dtype or DEFAULT_DTYPE
    wanted = quantization_of(quantize, config) if quantize and not recorded else None
    if device.type == "cuda" and weight_bytes(config, dtype, recorded or wanted) > (free := free_bytes(device)):
        raise too_little_for_weights(config, device, dtype, free, wanted=wanted, recorded=recorded)


class Engine:
    """A model directory. InputError where it does not fit, as soon as that can be known."""

    def __init__(self, directory: Path, machine: "MachineOptions"):
        self.directory, self._machine = directory, machine
        self._device = device_of(machine)
        self.tokenizer = Tokenizer.load(directory)
        self.config = read_config(path := file_of(directory, "config.json"))
        self._recorded = read_quantization(path)
        for flag, number, most in (("--rows", machine.rows, MAX_ROWS), ("--lookup", machine.lookup, MAX_ROWS - 1)):
            if number > most:
                raise InputError(f"{flag}: expected at most {most}, got {number}")

    @functools.cached_property
    def model(self) -> Phi:
        dtype, quantize = dtype_of(self._machine), self._machine.quantize
        require_memory(self.config, self._device, dtype, quantize, self._recorded)
        check_finite = self._machine.check_finite
        return load_pretrained(self.directory, self._device, dtype, quantize=quantize, check_finite=check_finite)

    @functools.cached_property
    def generator(self) -> Generator:
        return Generator(self.model, valid_ids=len(self.tokenizer), rows=self._machine.rows)

    @property
    def stop_ids(self) -> set[int]:
        """End of text as the shape and as the tokenizer have it: the oldest layout's config.json names none."""
        return {self.tokenizer.eos_id, self.config.eos_id} - {None}

    def load(self) -> None:
        """Brings the weights in now and not with the first prompt."""
        _ = self.generator

    def release(self) -> None:
        """Gives the memory of the weights back; they would be loaded anew."""
        for name in ("generator", "model"):
            self.__dict__.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

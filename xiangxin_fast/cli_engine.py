"""A model directory as the command line wants it: tokenizer and shape at once, the weights when they are needed."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoint import load_pretrained
from .errors import InputError
from .generator import Generator
from .hf_config import read_config
from .model import Phi
from .strict_files import file_of
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .cli_arguments import MachineOptions


def use_threads(machine: "MachineOptions") -> None:
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)


def device_of(machine: "MachineOptions") -> torch.device | None:
    """The device that was named; None for auto. InputError: there is no such device here."""
    if machine.device == "auto":
        return None
    try:
        device = torch.device(machine.device)
    except RuntimeError:
        raise InputError(f'--device: expected "auto", "cpu", "cuda" or "cuda:N", got {machine.device!r}') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{machine.device} and {torch.cuda.device_count()} GPUs"
        raise InputError(f"--device: expected a device of this machine, got {found}")
    return device


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(machine: "MachineOptions") -> torch.dtype | None:
    return None if machine.dtype == "auto" else getattr(torch, machine.dtype)


class Engine:
    """A model directory. InputError where it does not fit, as soon as that can be known."""

    def __init__(self, directory: Path, machine: "MachineOptions"):
        self.directory, self._machine = directory, machine
        self._device = device_of(machine)
        self.tokenizer = Tokenizer.load(directory)
        self.config = read_config(file_of(directory, "config.json"))

    @functools.cached_property
    def model(self) -> Phi:
        return load_pretrained(self.directory, self._device, dtype_of(self._machine))

    @functools.cached_property
    def generator(self) -> Generator:
        return Generator(self.model, valid_ids=len(self.tokenizer), rows=self._machine.rows)

    def load(self) -> None:
        """Brings the weights in now and not with the first prompt."""
        _ = self.generator

    def release(self) -> None:
        """Gives the memory of the weights back; they would be loaded anew."""
        for name in ("generator", "model"):
            self.__dict__.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

"""Model directories in Hugging Face's layout: config.json, model*.safetensors, generation_config.json, tokenizer files.

A directory may come from anyone: code in it is never run, nothing outside it is read, and names, shapes and dtypes of
its tensors must be exactly those that its config.json implies, in one of the layouts of layout.py.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from xiangxin_kernels import QuantizedWeight, unpacked

from .config import PhiConfig
from .errors import InputError
from .hf_config import Quantization, read_config, read_quantization, write_configs
from .layout import FUSED, NATIVE, REMOTE, Slot, slots_of
from .memory import free_bytes, lacks_memory
from .model import DEFAULT_DTYPE, Phi, refuse_fp16
from .quantization import (
    entries_of,
    place,
    quantization_of,
    read_rounded,
    require_bf16,
    rounded,
    tensors_of,
    too_little_for_weights,
)
from .safetensors_file import FLOAT_NAMES, SafetensorsFile, write_safetensors
from .strict_files import MIB, file_of, read_json, sync, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")
OUR_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

Item = TypeVar("Item")


def load_pretrained(
    directory: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    check_finite: bool = False,
    quantize: str | None = None,
) -> Phi:
    """The model of a directory in Hugging Face's layout, or of one that `python -m xiangxin_fast.quantize` wrote.

    `device` None means the GPU where there is one; `dtype` None means bf16, whatever the file holds. `quantize`, "int8"
    or "int4", rounds the matrices as they are read; such a model computes in bf16 and has no gradients. As in
    transformers the model is in evaluation mode; to train it, call `.train()` first.
    Memory: the model plus its largest layer. InputError where the directory does not fit; with `check_finite` also
    where a weight is NaN or infinite, in `dtype`, and where memory runs out.
    """
    directory = _directory(directory)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or DEFAULT_DTYPE
    refuse_fp16(dtype)
    config, recorded = read_config(path := file_of(directory, "config.json")), read_quantization(path)
    if quantize or recorded:
        require_bf16(dtype)
    if recorded and quantize not in (None, f"int{recorded.bits}"):
        raise InputError(f"{directory}: expected weights to round to {quantize}, got int{recorded.bits}")
    wanted = quantization_of(quantize, config) if quantize and not recorded else None
    model = Phi(config, "meta", dtype)
    if recorded:
        parameters = _rounded_parameters(model, directory, recorded, device, check_finite)
    else:
        parameters = _parameters(model, directory, device, check_finite, f"Loading {directory.name}")
    free = free_bytes(device)
    try:
        for name, value in rounded(parameters, wanted) if wanted else parameters:
            place(model, name, value)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        told = too_little_for_weights(config, device, dtype, free, wanted=wanted, recorded=recorded)
        raise InputError(f"{told} ({str(error).splitlines()[0]})") from None
    return model.eval().requires_grad_(not (recorded or wanted))


def _directory(directory: str | os.PathLike) -> Path:
    directory = Path(directory)
    if not directory.is_dir():
        got = "a file" if directory.exists() else "nothing"
        raise InputError(f"{directory}: expected a model directory, got {got}")
    return directory


def _parameters(
    model: Phi, directory: Path, device: torch.device, check_finite: bool, doing: str
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of `model`, which has no values, as soon as the last of the tensors it consists of is read."""
    files = _open_weights(directory)
    slots = _match(model.config, {name: file.tensors[name] for name, file in files.items()}, directory)
    empty, begun = dict(model.named_parameters()), {}
    unread = Counter(slot.parameter for slot in slots.values())
    for name, (parameter, part, _) in _progress(slots.items(), doing):
        values = files[name].read(name).to(device, model.embed.dtype)
        if check_finite:
            _require_finite(values, f"{files[name].path}: {name}")
        if parameter not in begun:
            begun[parameter] = torch.empty_like(empty[parameter], device=device, requires_grad=False)
        begun[parameter][part] = values
        unread[parameter] -= 1
        if not unread[parameter]:
            yield parameter, begun.pop(parameter)


def _rounded_parameters(
    model: Phi, directory: Path, quantization: Quantization, device: torch.device, check_finite: bool
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    files = _open_weights(directory)
    read = read_rounded(files, shapes, quantization, directory)
    for name, value in _progress(read, f"Loading {directory.name}", total=len(shapes)):
        parts = [part.to(device) for part in ((value,) if isinstance(value, Tensor) else value)]
        if check_finite:
            _require_finite(parts[-1], f"{directory}: {name}")
        yield name, parts[0] if isinstance(value, Tensor) else QuantizedWeight(*parts)


def quantize_directory(
    directory: str | os.PathLike, out: str | os.PathLike, kind: str, group: int | None = None, tokenizer=None
) -> None:
    """Rounds the weights of a model directory, tensor by tensor, into a new one that `load_pretrained` reads.

    `kind`: "int8" or "int4"; `group`: see `quantization_of`. Memory: one layer. InputError where a directory or a
    choice does not fit, and where a weight is not finite.
    """
    directory, out = _directory(directory), Path(out)
    config, recorded = read_config(path := file_of(directory, "config.json")), read_quantization(path)
    if recorded:
        raise InputError(f"{directory}: expected weights as they were trained, got int{recorded.bits}")
    if out.exists() and out.samefile(directory):
        raise InputError(f"{out}: expected a directory other than the one read")
    quantization = quantization_of(kind, config, group)
    model = Phi(config, "meta", torch.bfloat16)
    shapes, order = {name: p.shape for name, p in model.named_parameters()}, slots_of(config).values()
    # In the order in which they are complete: that of the last of their tensors.
    order = list(dict.fromkeys(slot.parameter for slot in reversed(order)))[::-1]
    parameters = _parameters(model, directory, torch.device("cpu"), True, f"Rounding {directory.name}")
    entries = entries_of({name: shapes[name] for name in order}, quantization)
    with _new_weights(out, [SINGLE]) as (partial,):
        write_safetensors(partial, entries, tensors_of(rounded(parameters, quantization)))
    if tokenizer is not None:
        tokenizer.save(out, config.context)
    write_configs(out, config, torch.bfloat16, quantization)
    sync(out)


def _open_weights(directory: Path) -> dict[str, SafetensorsFile]:
    """The file that holds each tensor, by the tensor's name."""
    if (directory / SINGLE).exists():
        file = SafetensorsFile(file_of(directory, SINGLE))
        return dict.fromkeys(file.tensors, file)
    if not (directory / INDEX).exists():
        if any(directory.glob("*.bin")):
            raise InputError(
                f"{directory}: expected {SINGLE}, got only .bin files; convert them once, where you trust them, with "
                "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        raise InputError(f"{directory}: expected {SINGLE} or {INDEX}, got neither")
    index = file_of(directory, INDEX)
    weight_map = read_json(index, 16 * MIB).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: expected an object under weight_map, got {type(weight_map).__name__}")
    shards: dict[str, SafetensorsFile] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise InputError(f"{index}: expected the name of a .safetensors file beside it, got {name!r:.100}")
        if name not in shards:
            shards[name] = SafetensorsFile(file_of(directory, name))
        if tensor not in shards[name].tensors:
            raise InputError(f"{index}: expected {tensor!r:.100} in {name}, which does not hold it")
    for name, shard in shards.items():
        unlisted = [tensor for tensor in shard.tensors if weight_map.get(tensor) != name]
        if unlisted:
            raise InputError(f"{index}: expected every tensor of {name}, got none of {_some(unlisted)}")
    return {tensor: shards[name] for tensor, name in weight_map.items()}


def _match(config: PhiConfig, tensors: dict[str, tuple[str, tuple[int, ...]]], directory: Path) -> dict[str, Slot]:
    """The slot of each tensor, once names, shapes and dtypes are exactly those of one layout."""
    if config.layers > len(tensors):
        raise InputError(f"{directory}: expected tensors of {config.layers} layers, got {len(tensors)} tensors in all")
    layouts = (NATIVE, FUSED, REMOTE)
    layout = next((a for a in layouts if f"{a.layer.format(0)}{a.qkv[0]}.weight" in tensors), NATIVE)
    slots = slots_of(config, layout)
    missing = [name for name in slots if name not in tensors]
    if missing:
        raise InputError(f"{directory}: expected {len(slots)} tensors, got none named {_some(missing)}")
    extra = [name for name in tensors if name not in slots and not name.endswith(".rotary_emb.inv_freq")]
    if extra:
        raise InputError(f"{directory}: expected only Phi's tensors, got also {_some(extra)}")
    for name, slot in slots.items():
        dtype, shape = tensors[name]
        if shape != slot.shape:
            raise InputError(f"{directory}: expected {name} {list(slot.shape)}, got {list(shape)}")
        if dtype not in FLOAT_NAMES.values():
            raise InputError(f"{directory}: expected {name} in {', '.join(FLOAT_NAMES.values())}, got {dtype}")
    return slots


def save_pretrained(
    model: Phi, directory: str | os.PathLike, tokenizer=None, *, shard_bytes: int = 5_000_000_000
) -> None:
    """Writes the model, and the tokenizer's files, to a directory that transformers 4.37 and later load natively.

    Weights keep the model's dtype, in files of at most `shard_bytes` (or of one tensor). Memory: a copy of one
    tensor. A model already there stays whole until every new weight is on the disk. InputError where a weight is not
    finite, where the tokenizer has more ids than the model, and where the directory cannot be written.
    """
    directory = Path(directory)
    if tokenizer is not None and len(tokenizer) > model.config.vocab:
        raise InputError(f"{directory}: expected a tokenizer of at most {model.config.vocab} ids, got {len(tokenizer)}")
    if any(isinstance(getattr(block, name), tuple) for block in model.blocks for name in ("w_in", "w_out")):
        raise InputError(f"{directory}: expected a model to write as it was trained, got one with rounded weights")
    size = model.embed.element_size()
    slots = slots_of(model.config)
    shards = _shards(slots, size, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    weights = _weights(model, slots, directory)
    with _new_weights(directory, names) as partial:
        for path, shard in zip(partial, shards, strict=True):
            entries = {name: (model.embed.dtype, slots[name].shape) for name in shard}
            write_safetensors(path, entries, islice(weights, len(shard)))
    if tokenizer is not None:
        tokenizer.save(directory, model.config.context)
    if len(shards) > 1:
        total = size * sum(math.prod(slot.shape) for slot in slots.values())
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_configs(directory, model.config, model.embed.dtype)
    sync(directory)


@contextmanager
def _new_weights(directory: Path, names: list[str]) -> Iterator[list[Path]]:
    """Files to write weights to, which take the place of those in `directory` once all of them are whole."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: expected a directory to write to, got: {error.strerror}") from None
    partial = [directory / f"{name}.partial" for name in names]
    try:
        yield partial
    except BaseException as error:
        for path in partial:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{directory}: expected to write the weights here, got: {error.strerror}") from None
        raise
    # Without config.json a directory is no model: from here to the end nobody can load a mixture of old and new.
    (directory / "config.json").unlink(missing_ok=True)
    (directory / INDEX).unlink(missing_ok=True)
    for path in directory.iterdir():
        if OUR_WEIGHTS.fullmatch(path.name):
            path.unlink()
    for path, name in zip(partial, names, strict=True):
        path.rename(directory / name)


def _shards(slots: dict[str, Slot], size: int, limit: int) -> list[list[str]]:
    """Names of tensors, in order, in groups of at most `limit` bytes or of one tensor; `size` bytes a number."""
    shards, room = [], 0
    for name, slot in slots.items():
        needed = size * math.prod(slot.shape)
        if needed > room or not shards:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= needed
    return shards


def _weights(model: Phi, slots: dict[str, Slot], directory: Path) -> Iterator[Tensor]:
    for name, slot in _progress(slots.items(), f"Writing {directory.name}"):
        values = unpacked(model.get_parameter(slot.parameter).detach())[slot.part]
        _require_finite(values, f"{directory}: {name}")
        yield values


def _require_finite(values: Tensor, where: str) -> None:
    if not values.isfinite().all():
        raise InputError(f"{where}: expected finite weights, got {int((~values.isfinite()).sum())} NaN or infinite")


def _some(names: list[str]) -> str:
    """The first few of `names` and how many more there are, on one line whatever they hold."""
    shown = ", ".join(f"{name!r:.100}" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _progress(items: Iterable[Item], doing: str, total: int | None = None) -> Iterable[Item]:
    """Goes through `items` with a bar on stderr where a person watches."""
    console = Console(stderr=True)
    return track(items, doing, total, console=console, transient=True, disable=not console.is_terminal)

"""Models whose matrices are rounded to 8 or 4 bits: in memory, and in files.

Rounded are w_in, w_out and an untied head; embedding, biases and LayerNorms stay in bf16. A file holds Phi's own
parameters under Phi's names, a rounded one as NAME.codes and NAME.scale in the layout of xiangxin_kernels' quantize.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from xiangxin_kernels import QuantizedWeight, default_group, quantize, unpacked

from .config import PhiConfig
from .errors import InputError
from .hf_config import Quantization
from .memory import gigabytes
from .model import Phi
from .safetensors_file import DTYPE_NAMES, SafetensorsFile

BITS = {"int8": 8, "int4": 4}
ROUNDED = ("w_in", "w_out", "head_w")

Entry = tuple[torch.dtype, tuple[int, ...]]


def quantization_of(kind: str, config: PhiConfig, group: int | None = None) -> Quantization:
    """What `kind`, "int8" or "int4", means for a model of this shape. InputError where it does not fit.

    `group`: 32, 64 or 128 numbers share a scale of 4 bits; default: 64, or 32 where 64 does not divide the rows.
    """
    if kind not in BITS:
        raise InputError(f"quantize: expected {' or '.join(BITS)}, got {kind!r}")
    columns = (config.channels, config.channels + config.mlp_hidden)
    if BITS[kind] == 8:
        if group is not None:
            raise InputError(f"quantize: expected a group with int4 only, got {group} with int8")
        if any(K % 4 for K in columns):
            raise InputError(f"quantize: expected multiples of 4 columns for 8 bits, got {columns[0]} and {columns[1]}")
        return Quantization(8, None)
    try:
        group = group or min(map(default_group, columns))
    except ValueError as error:
        raise InputError(str(error)) from None
    if group not in (32, 64, 128) or any(K % group for K in columns):
        raise InputError(
            f"quantize: expected a group of 32, 64 or 128 that divides {columns[0]} and {columns[1]}, got {group}"
        )
    return Quantization(4, group)


def rounded(
    parameters: Iterable[tuple[str, Tensor]], quantization: Quantization
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """`parameters` as they come, those to be rounded as QuantizedWeights."""
    for name, values in parameters:
        is_rounded = name.rpartition(".")[2] in ROUNDED
        yield name, quantize(values, *quantization) if is_rounded else values


def place(model: Phi, name: str, value: Tensor | QuantizedWeight) -> None:
    """Makes `value` the parameter `name` of `model`."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(value, Tensor):
        setattr(module, leaf, nn.Parameter(value))
    else:
        delattr(module, leaf)
        setattr(module, leaf, value)
    if name == "embed" and model.config.tied_head:
        model.head_w = model.embed


def quantize_model(model: Phi, kind: str) -> Phi:
    """Rounds the weights of a bf16 `model`, in place, to "int8" or "int4"; memory: one weight more. InputError."""
    require_bf16(model.embed.dtype)
    parameters = ((name, unpacked(model.get_parameter(name).detach())) for name, _ in list(model.named_parameters()))
    for name, value in rounded(parameters, quantization_of(kind, model.config)):
        place(model, name, value)
    return model.eval().requires_grad_(False)


def require_bf16(dtype: torch.dtype) -> None:
    """InputError unless `dtype` is what a quantized model computes in."""
    if dtype != torch.bfloat16:
        raise InputError(f"quantize: expected bf16 to compute in, got {dtype}: rounded weights have fewer digits")


def entries_of(shapes: Mapping[str, tuple[int, ...]], quantization: Quantization) -> dict[str, Entry]:
    """dtype and shape of each tensor of a file, in order, for parameters of these shapes."""
    entries: dict[str, Entry] = {}
    for name, shape in shapes.items():
        if name.rpartition(".")[2] not in ROUNDED:
            entries[name] = (torch.bfloat16, tuple(shape))
            continue
        (N, K), (bits, group) = shape, quantization
        codes, scale = ((torch.int8, (N, K)), (N,)) if bits == 8 else ((torch.uint8, (N, K // 2)), (N, K // group))
        entries[f"{name}.codes"], entries[f"{name}.scale"] = codes, (torch.bfloat16, scale)
    return entries


def weight_bytes(config: PhiConfig, dtype: torch.dtype, quantization: Quantization | None) -> int:
    """Bytes of a model's weights in memory."""
    if quantization is None:
        return config.parameters * dtype.itemsize
    shapes = {name: parameter.shape for name, parameter in Phi(config, "meta").named_parameters()}
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in entries_of(shapes, quantization).values())


def too_little_for_weights(
    config: PhiConfig,
    device: torch.device,
    dtype: torch.dtype,
    free: int,
    *,
    wanted: Quantization | None,
    recorded: Quantization | None,
) -> InputError:
    """What to tell where the weights do not fit in `free` bytes: what they need, and what would do.

    `wanted` is how they are to be rounded, `recorded` how they are already, so that they cannot be rounded further.
    """
    needed, fits = weight_bytes(config, dtype, recorded or wanted), []
    for kind in () if recorded else BITS:
        try:
            size = weight_bytes(config, dtype, quantization_of(kind, config))
        except InputError:  # a shape that 4 bits do not fit, which nobody asked for
            continue
        if size < min(needed, free):
            fits.append(f"--quantize {kind} ({gigabytes(size)})")
    needs = f"expected {gigabytes(needed)} of free memory on {device} for the weights, got {gigabytes(free)}"
    elsewhere = ["--device cpu"] if device.type == "cuda" else []
    return InputError(f"{needs}; {' or '.join([*fits, *elsewhere]) or 'a smaller model'} would fit")


def tensors_of(parameters: Iterable[tuple[str, Tensor | QuantizedWeight]]) -> Iterator[Tensor]:
    """What a file holds of each of `parameters`."""
    for _, value in parameters:
        yield from (value,) if isinstance(value, Tensor) else value


def read_rounded(
    files: Mapping[str, SafetensorsFile],
    shapes: Mapping[str, tuple[int, ...]],
    quantization: Quantization,
    directory: Path,
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Parameters of these shapes from files that `entries_of` describes. InputError on anything else in them."""
    entries = entries_of(shapes, quantization)
    for name in entries.keys() | files.keys():
        expected = found = "no such tensor"
        if name in entries:
            expected = f"{DTYPE_NAMES[entries[name][0]]} {list(entries[name][1])}"
        if name in files:
            dtype, shape = files[name].tensors[name]
            found = f"{dtype} {list(shape)}"
        if expected != found:
            raise InputError(f"{directory}: expected {name!r:.100} {expected}, got {found:.100}")
    for name in shapes:
        if name in entries:
            yield name, files[name].read(name)
        else:
            yield name, QuantizedWeight(*(files[part].read(part) for part in (f"{name}.codes", f"{name}.scale")))

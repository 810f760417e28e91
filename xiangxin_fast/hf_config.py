"""config.json and generation_config.json of a model directory, to and from PhiConfig.

Two dialects are read: model_type "phi" (transformers >= 4.36; since 5.0 with rope_parameters, which wins over the older
keys) and "phi-msft" (the code once shipped with phi-1, phi-1.5 and phi-2). Dropout is ignored: the model has none.
Anything else that would change the arithmetic is refused. Entries that name code, such as auto_map, are never followed.
A directory whose weights `python -m xiangxin_fast.quantize` wrote has a record of that, in place of which any other
quantization is refused.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from .config import PhiConfig
from .errors import InputError
from .safetensors_file import TENSOR_LIMIT
from .strict_files import read_json, write_json

SIZE_LIMIT = 1 << 20  # of any one axis; keeps a hostile config from asking for the machine's memory
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
QUANT_METHOD = "xiangxin"
CODES_LAYOUT = 2  # the first had 4-bit codes in the order of the columns


class Quantization(NamedTuple):
    """How weights are rounded: xiangxin_kernels.quantize tells the meaning."""

    bits: int
    group: int | None  # None with 8 bits


class _Fields:
    """Typed reading of a JSON object's entries; InputError names the file and the key."""

    def __init__(self, values: dict, where: str):
        self.values, self.where = values, where

    def refuse(self, key: str, expected: str):
        raise InputError(f"{self.where}: expected {key} {expected}, got {self.values.get(key)!r:.100}")

    def size(self, key: str, default: int | None = None, limit: int = SIZE_LIMIT) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= limit:
            self.refuse(key, f"a whole number in 1..{limit}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            self.refuse(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return value

    def token(self, key: str, vocab: int) -> int | None:
        """An id, given alone or as a list of one; None where there is none."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None and (type(value) is not int or not 0 <= value < vocab):
            self.refuse(key, f"one id in 0..{vocab - 1}")
        return value

    def one_of(self, key: str, allowed: tuple) -> None:
        if self.values.get(key) not in (None, *allowed):
            self.refuse(key, f"{' or '.join(map(repr, allowed)) or 'null'}")


def read_config(path: Path) -> PhiConfig:
    """The PhiConfig of a config.json. InputError where it is not a Phi that the model computes."""
    fields = _Fields(read_json(path), str(path))
    readers = {"phi": _read_native, "phi-msft": _read_remote}
    model_type = fields.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in readers:
        fields.refuse("model_type", "'phi' or 'phi-msft'")
    _read_quantization(fields)
    values = readers[model_type](fields)
    try:
        return PhiConfig(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_quantization(path: Path) -> Quantization | None:
    """How the weights beside a config.json are rounded; None where they are not. InputError where we did not do it."""
    return _read_quantization(_Fields(read_json(path), str(path)))


def _read_quantization(fields: _Fields) -> Quantization | None:
    record = fields.values.get("quantization_config")
    if record is None:
        return None
    known = [Quantization(8, None), *(Quantization(4, size) for size in (32, 64, 128))]
    found = next((q for q in known if record == _record(q)), None)
    if found is None:
        fields.refuse("quantization_config", "null or that of python -m xiangxin_fast.quantize")
    return found


def _record(quantization: Quantization) -> dict:
    return {"quant_method": QUANT_METHOD, "layout": CODES_LAYOUT} | quantization._asdict()


def _read_native(fields: _Fields) -> dict:
    vocab, channels, heads = (fields.size(key) for key in ("vocab_size", "hidden_size", "num_attention_heads"))
    fields.one_of("num_key_value_heads", (heads,))
    fields.one_of("qk_layernorm", (False,))
    fields.one_of("hidden_act", TANH_GELU)
    fields.one_of("rope_scaling", ())
    if fields.values.get("head_dim") is not None and fields.values["head_dim"] != channels / heads:
        fields.refuse("head_dim", f"{channels / heads:g} (hidden_size / num_attention_heads)")
    theta, factor = fields.number("rope_theta", 10000.0), fields.number("partial_rotary_factor", 0.5)
    rope = fields.values.get("rope_parameters")
    if rope is not None:
        if not isinstance(rope, dict):
            fields.refuse("rope_parameters", "an object")
        rope = _Fields(rope, f"{fields.where} (rope_parameters)")
        rope.one_of("rope_type", ("default",))
        theta, factor = rope.number("rope_theta", theta), rope.number("partial_rotary_factor", factor)
    return dict(
        vocab=vocab,
        channels=channels,
        layers=fields.size("num_hidden_layers", limit=TENSOR_LIMIT),
        heads=heads,
        rotary_dim=int(channels // heads * factor),
        mlp_hidden=fields.size("intermediate_size"),
        context=fields.size("max_position_embeddings", 2048),
        rope_theta=theta,
        eps=fields.number("layer_norm_eps", 1e-5),
        tied_head=fields.flag("tie_word_embeddings"),
        init_std=fields.number("initializer_range", 0.02),
        bos_id=fields.token("bos_token_id", vocab),
        eos_id=fields.token("eos_token_id", vocab),
    )


def _read_remote(fields: _Fields) -> dict:
    vocab, channels, heads = (fields.size(key) for key in ("vocab_size", "n_embd", "n_head"))
    fields.one_of("n_head_kv", (heads,))
    fields.one_of("activation_function", TANH_GELU)
    return dict(
        vocab=vocab,
        channels=channels,
        layers=fields.size("n_layer", limit=TENSOR_LIMIT),
        heads=heads,
        rotary_dim=min(fields.size("rotary_dim", 32), channels // heads),
        mlp_hidden=fields.size("n_inner", 4 * channels),
        context=fields.size("n_positions", 2048),
        eps=fields.number("layer_norm_epsilon", 1e-5),
        tied_head=fields.flag("tie_word_embeddings"),
        init_std=fields.number("initializer_range", 0.02),
        bos_id=fields.token("bos_token_id", vocab),
        eos_id=fields.token("eos_token_id", vocab),
    )


def rotary_factor(config: PhiConfig) -> float:
    """The smallest factor from R / D upwards that transformers, which truncates D * factor, turns back into R."""
    factor = config.rotary_dim / config.head_dim
    while int(config.head_dim * factor) < config.rotary_dim:
        factor = math.nextafter(factor, 1.0)
    return factor


def write_configs(
    directory: Path, config: PhiConfig, dtype: torch.dtype, quantization: Quantization | None = None
) -> None:
    """Writes generation_config.json and config.json for transformers 4.37 and later.

    transformers 5 moved the rotary numbers into rope_parameters; older ones read them at the top and would silently
    rotate half of each head without them, so both places get them.
    """
    factor = rotary_factor(config)
    ids = {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id}
    version = {"transformers_version": "4.37.0"}
    write_json(directory / "generation_config.json", {"_from_model_config": True} | ids | version)
    native = {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": config.vocab,
        "hidden_size": config.channels,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": config.context,
        "hidden_act": "gelu_new",
        "layer_norm_eps": config.eps,
        "qk_layernorm": False,
        "partial_rotary_factor": factor,
        "rope_theta": config.rope_theta,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": factor,
        },
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    record = {} if quantization is None else {"quantization_config": _record(quantization)}
    write_json(directory / "config.json", native | ids | version | record)

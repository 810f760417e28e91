"""Model directories from people who mean harm or had bad luck: each is refused in one line that says what is wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hf import random_model
from xiangxin_fast import load_pretrained, save_pretrained
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.errors import InputError
from xiangxin_fast.safetensors_file import HEADER_LIMIT, SafetensorsFile

CONFIG = PhiConfig(vocab=515, channels=160, layers=3, heads=2, rotary_dim=32, mlp_hidden=640, context=64, eos_id=0)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A sound directory in one file, and one in shards beside it; tests copy them."""
    root = tmp_path_factory.mktemp("sound")
    model = random_model(CONFIG)
    save_pretrained(model, root / "single")
    save_pretrained(model, root / "sharded", shard_bytes=200_000)
    return root


@pytest.fixture
def directory(sound, tmp_path) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        (tmp_path / kind).mkdir()
        for path in (sound / kind).iterdir():
            (tmp_path / kind / path.name).write_bytes(path.read_bytes())
        return tmp_path / kind

    return copy


def refusal(path: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        load_pretrained(path, "cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert str(path) in message
    return message


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CONFIG_FAULTS = {
    "empty": ("", "expected strict JSON"),
    "binary": (b"\xff\xfe\x00", "expected strict JSON"),
    "cut off": ('{"model_type": "phi"', "expected strict JSON"),
    "a list": ("[]", "expected a JSON object, got list"),
    "a key twice": ('{"model_type": "phi", "model_type": "phi"}', "got the key 'model_type' twice"),
    "a key twice further in": ('{"rope_parameters": {"a": 1, "a": 2}}', "got the key 'a' twice"),
    "NaN": ('{"layer_norm_eps": NaN}', "got the constant NaN"),
    "infinity": ('{"layer_norm_eps": -Infinity}', "got the constant -Infinity"),
    "deep nesting": ("[" * 100_000, "got nesting without end"),
    "a number of 5000 digits": ('{"vocab_size": ' + "9" * 5000 + "}", "expected strict JSON"),
    "two megabytes": (" " * 2_000_000, "expected at most 1048576 bytes, got more"),
}


@pytest.mark.parametrize(("content", "message"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_a_config_that_is_not_strict_json(directory, content, message):
    path = directory("single")
    (path / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in refusal(path)


CONFIG_VALUES = {
    "another architecture": ({"model_type": "phi3"}, "expected model_type 'phi' or 'phi-msft', got 'phi3'"),
    "no model_type": ({"model_type": None}, "expected model_type 'phi' or 'phi-msft', got None"),
    "qk_layernorm": ({"qk_layernorm": True}, "expected qk_layernorm False, got True"),
    "grouped KV heads": ({"num_key_value_heads": 1}, "expected num_key_value_heads 2, got 1"),
    "another activation": ({"hidden_act": "silu"}, "expected hidden_act 'gelu_new' or 'gelu_pytorch_tanh', got 'silu'"),
    "another head_dim": ({"head_dim": 64}, "expected head_dim 80 (hidden_size / num_attention_heads), got 64"),
    "scaled rotary": ({"rope_scaling": {"type": "linear", "factor": 2}}, "expected rope_scaling null, got {"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn"}}, "expected rope_type 'default', got 'yarn'"),
    "rope_parameters a list": ({"rope_parameters": []}, "expected rope_parameters an object, got []"),
    "an odd rotary dim": (
        {"rope_parameters": None, "partial_rotary_factor": 0.32},
        "expected an even rotary_dim in 2..80, got 25",
    ),
    "too much rotary": ({"rope_parameters": {"partial_rotary_factor": 1e9}}, "expected an even rotary_dim in 2..80"),
    "quantised": (
        {"quantization_config": {"bits": 4}},
        "expected quantization_config null or that of python -m xiangxin_fast.quantize, got {'bits': 4}",
    ),
    "a size below 1": ({"hidden_size": 0}, "expected hidden_size a whole number in 1..1048576, got 0"),
    "a size that is true": ({"num_attention_heads": True}, "expected num_attention_heads a whole number"),
    "a size with a fraction": ({"hidden_size": 160.0}, "expected hidden_size a whole number"),
    "a size in quotes": ({"vocab_size": "515"}, "expected vocab_size a whole number in 1..1048576, got '515'"),
    "a huge size": ({"vocab_size": 10**30}, "expected vocab_size a whole number in 1..1048576"),
    "a size left out": ({"vocab_size": None}, "expected vocab_size a whole number in 1..1048576, got None"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "expected num_hidden_layers a whole number in 1..10000"),
    "ten thousand layers": ({"num_hidden_layers": 10_000}, "expected tensors of 10000 layers, got 47 tensors in all"),
    "heads that do not divide": ({"num_attention_heads": 3}, "expected num_key_value_heads 3, got 2"),
    "a negative theta": ({"rope_parameters": {"rope_theta": -1}}, "expected rope_theta a positive number, got -1"),
    "theta in quotes": ({"rope_parameters": {"rope_theta": "1"}}, "expected rope_theta a positive number, got '1'"),
    "tied in quotes": ({"tie_word_embeddings": "no"}, "expected tie_word_embeddings true or false, got 'no'"),
    "an end past the vocabulary": ({"eos_token_id": 515}, "expected eos_token_id one id in 0..514, got 515"),
    "two ends": ({"eos_token_id": [1, 2]}, "expected eos_token_id one id in 0..514, got [1, 2]"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIG_VALUES.values(), ids=CONFIG_VALUES)
def test_a_config_that_is_no_phi_of_ours(directory, changes, message):
    path = directory("single")
    edit_json(path / "config.json", **changes)
    assert message in refusal(path)


def test_a_number_past_all_floats(directory):
    path = directory("single")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"layer_norm_eps": 1e-05', '"layer_norm_eps": 1e999'))
    assert "expected layer_norm_eps a positive number, got inf" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head_kv": 1}, "expected n_head_kv 2, got 1"),
        ({"n_embd": 1.5}, "expected n_embd a whole number"),
        ({"activation_function": "relu"}, "expected activation_function 'gelu_new'"),
        ({"rotary_dim": 31}, "expected an even rotary_dim in 2..80, got 31"),
    ],
)
def test_an_old_config_that_is_no_phi_of_ours(directory, changes, message):
    path = directory("single")
    old = {"model_type": "phi-msft", "vocab_size": 515, "n_embd": 160, "n_head": 2, "n_layer": 3, "n_inner": 640}
    (path / "config.json").write_text(json.dumps(old | {"n_positions": 64}))
    load_pretrained(path, "cpu")
    edit_json(path / "config.json", **changes)
    assert message in refusal(path)


def change_tensors(path: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


FC1 = "model.layers.1.mlp.fc1.weight"
TENSOR_FAULTS = {
    "missing": (lambda t: t.pop(FC1), f"expected 47 tensors, got none named '{FC1}'"),
    "many missing": (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], "and 11 more"),
    "extra": (lambda t: t.update(evil=torch.ones(1)), "expected only Phi's tensors, got also 'evil'"),
    "named like a path": (lambda t: t.update({"../../etc/passwd": torch.ones(1)}), "got also '../../etc/passwd'"),
    "named with line breaks": (lambda t: t.update({"a\nb\x1b[2J": torch.ones(1)}), r"got also 'a\nb\x1b[2J'"),
    "a layer too many": (lambda t: t.update({FC1.replace("1", "3", 1): torch.ones(1)}), "got also"),
    "wrong shape": (lambda t: t.update({FC1: t[FC1][:-1]}), f"expected {FC1} [640, 160], got [639, 160]"),
    "transposed": (lambda t: t.update({FC1: t[FC1].T.contiguous()}), f"expected {FC1} [640, 160], got [160, 640]"),
    "int8": (lambda t: t.update({FC1: t[FC1].to(torch.int8)}), f"expected {FC1} in F64, F32, F16, BF16, got I8"),
    "fp8": (lambda t: t.update({FC1: t[FC1].to(torch.float8_e4m3fn)}), "got F8_E4M3"),
    "qk_layernorm": (lambda t: t.update({"model.layers.0.self_attn.q_layernorm.weight": torch.ones(80)}), "got also"),
}


@pytest.mark.parametrize(("change", "message"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_tensors_that_are_not_exactly_those_of_the_config(directory, change, message):
    path = directory("single")
    change_tensors(path, change)
    assert message in refusal(path)


def test_weights_that_are_not_finite(directory):
    path = directory("single")
    for value, dtype in ((float("nan"), None), (float("inf"), None), (3.4e38, torch.bfloat16)):
        change_tensors(path, lambda tensors, value=value: tensors[FC1].view(-1).__setitem__(5, value))
        load_pretrained(path, "cpu", dtype)
        message = refusal(path, dtype=dtype, check_finite=True)
        assert f"{FC1}: expected finite weights, got 1 NaN or infinite" in message


def header_of(path: Path) -> tuple[dict, bytes]:
    data = (path / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, header: str, data: bytes) -> None:
    (path / WEIGHTS).write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + data)


def duplicate_name(path: Path) -> None:
    header, data = header_of(path)
    text = json.dumps(header)
    with_header(path, text[:-1] + f', "{FC1}": {json.dumps(header[FC1])}}}', data)


def long_header(path: Path) -> None:
    header, data = header_of(path)
    with_header(path, json.dumps(header) + " " * HEADER_LIMIT, data)


def many_tensors(path: Path) -> None:
    with_header(
        path, json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_001)}), b""
    )


def overlapping(path: Path) -> None:
    header, data = header_of(path)
    header[FC1]["data_offsets"] = header["model.layers.0.mlp.fc1.weight"]["data_offsets"]
    with_header(path, json.dumps(header), data)


def shape_overflow(path: Path) -> None:
    header, data = header_of(path)
    header[FC1]["shape"] = [2**62, 4]
    with_header(path, json.dumps(header), data)


FILE_FAULTS = {
    "empty": (lambda path: os.truncate(path / WEIGHTS, 0), "expected strict JSON"),
    "cut off in the header": (lambda path: os.truncate(path / WEIGHTS, 500), "expected strict JSON"),
    "cut off in the data": (lambda path: os.truncate(path / WEIGHTS, 300_000), "expected a whole safetensors file"),
    "one byte short": (
        lambda path: os.truncate(path / WEIGHTS, (path / WEIGHTS).stat().st_size - 1),
        "expected a whole safetensors file",
    ),
    "one byte long": (lambda path: open(path / WEIGHTS, "ab").write(b"x"), "expected a whole safetensors file"),
    "a web page": (lambda path: (path / WEIGHTS).write_bytes(b"<!DOCTYPE html>" * 9), "expected a header of at most"),
    "a header of an exabyte": (
        lambda path: (path / WEIGHTS).write_bytes((2**60).to_bytes(8, "little")),
        "expected a header of at most 4194304 bytes",
    ),
    "a long header": (long_header, "expected a header of at most 4194304 bytes"),
    "a name twice": (duplicate_name, f"got the key '{FC1}' twice"),
    "many tensors": (many_tensors, "expected at most 10000 tensors, got 10001"),
    "overlapping tensors": (overlapping, "expected a whole safetensors file"),
    "a shape past 64 bits": (shape_overflow, "expected a whole safetensors file"),
    "a directory": (lambda path: (path / WEIGHTS).rename(path / "x") and (path / WEIGHTS).mkdir(), "expected a file"),
    "a pipe": (lambda path: (path / WEIGHTS).unlink() or os.mkfifo(path / WEIGHTS), "expected a file"),
    "a link to nothing": (
        lambda path: (path / WEIGHTS).unlink() or (path / WEIGHTS).symlink_to("absent"),
        "expected model.safetensors or model.safetensors.index.json, got neither",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_a_weight_file_that_is_broken(directory, spoil, message):
    path = directory("single")
    spoil(path)
    assert message in refusal(path)


def remap(path: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


LAST = "model.final_layernorm.bias"
INDEX_FAULTS = {
    "climbs out": (
        lambda m: m.update({LAST: "../single/model.safetensors"}),
        "expected the name of a .safetensors",
    ),
    "absolute": (lambda m: m.update({LAST: "/etc/passwd"}), "expected the name of a .safetensors"),
    "absolute safetensors": (lambda m: m.update({LAST: "/x.safetensors"}), "expected the name of a .safetensors"),
    "another kind of file": (lambda m: m.update({LAST: "model.bin"}), "expected the name of a .safetensors"),
    "an address": (lambda m: m.update({LAST: "http://a/b.safetensors"}), "expected the name of a .safetensors"),
    "no string": (lambda m: m.update({LAST: 5}), "expected the name of a .safetensors file beside it, got 5"),
    "a zero byte": (lambda m: m.update({LAST: "a\0b.safetensors"}), "expected the name of a .safetensors"),
    "a shard that is absent": (
        lambda m: m.update({LAST: "no.safetensors"}),
        "expected a file no.safetensors, got none",
    ),
    "the wrong shard": (
        lambda m: m.update({LAST: m["model.embed_tokens.weight"]}),
        f"expected '{LAST}' in model-00001-of-",
    ),
    "a tensor in no shard": (lambda m: m.update(ghost=m[LAST]), "expected 'ghost' in model-"),
    "a tensor left out": (lambda m: m.pop(LAST), f"got none of '{LAST}'"),
    "empty": (lambda m: m.clear(), "expected tensors of 3 layers, got 0 tensors in all"),
}


@pytest.mark.parametrize(("change", "message"), INDEX_FAULTS.values(), ids=INDEX_FAULTS)
def test_an_index_that_lies(directory, change, message):
    path = directory("sharded")
    load_pretrained(path, "cpu")
    remap(path, change)
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "got the key 'a' twice"),
        ('{"weight_map": []}', "expected an object under weight_map, got list"),
        ("{}", "expected an object under weight_map, got NoneType"),
        (" " * (1 << 24) + "{}", "expected at most 16777216 bytes"),
    ],
    ids=["a key twice", "a list", "nothing", "too long"],
)
def test_an_index_that_is_no_index(directory, content, message):
    path = directory("sharded")
    (path / INDEX).write_text(content)
    assert message in refusal(path)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_link_out_of_the_directory(directory, tmp_path, name):
    path = directory("single")
    (path / name).rename(tmp_path / "secret")
    (path / name).symlink_to(tmp_path / "secret")
    assert f"expected a file of this directory, got a link to {tmp_path / 'secret'}" in refusal(path)


def test_a_link_out_of_the_cache(directory, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    directory("single").rename(snapshot)
    for target in ("../../../secret", "../../refs/main", "../../blobs/sub/x"):
        file = snapshot / target
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((snapshot / "generation_config.json").read_bytes())
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target)
        assert "expected a file of this directory, got a link to" in refusal(snapshot)


def test_a_file_that_shrinks_while_it_is_read(directory):
    path = directory("single")
    file = SafetensorsFile(path / WEIGHTS)
    os.truncate(path / WEIGHTS, 10_000)
    with pytest.raises(InputError, match=f"tensor '{FC1}' cannot be read"):
        file.read(FC1)


def test_only_pickled_weights(directory):
    path = directory("single")
    (path / WEIGHTS).unlink()
    assert "got neither" in refusal(path)
    (path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    message = refusal(path)
    assert "got only .bin files" in message
    assert "save_pretrained" in message


def test_no_directory(tmp_path):
    assert "expected a model directory, got nothing" in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "expected a model directory, got a file" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "expected a file config.json, got none" in refusal(tmp_path / "empty")


def test_a_tied_model_with_a_head_of_its_own(directory):
    path = directory("single")
    edit_json(path / "config.json", tie_word_embeddings=True)
    assert "expected only Phi's tensors, got also 'lm_head.weight'" in refusal(path)


def test_somewhere_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a directory to write to"):
        save_pretrained(random_model(CONFIG), tmp_path / "file")


@pytest.mark.parametrize(("kind", "name"), [("single", "config.json"), ("sharded", INDEX), ("single", WEIGHTS)])
def test_damage_at_any_byte_leads_to_nothing_but_a_refusal(directory, kind, name):
    path = directory(kind)
    whole = (path / name).read_bytes()
    head = int.from_bytes(whole[:8], "little") + 8 if name.endswith(".safetensors") else len(whole)
    random = torch.Generator().manual_seed(0)
    refusals = []
    for place, value, cut in torch.randint(0, 2**31, (150, 3), generator=random).tolist():
        damaged = bytearray(whole)
        damaged[place % head] = value % 256
        (path / name).write_bytes(damaged[: cut % len(whole)] if cut % 4 == 0 else damaged)
        try:
            load_pretrained(path, "cpu")
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert not any("\n" in message for message in refusals)

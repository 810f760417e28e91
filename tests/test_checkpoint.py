"""Model directories: what we write others read, what others wrote we read. test_hostile_files has what we refuse."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.hf import fuse, oracle, random_model
from xiangxin_fast import checkpoint, load_pretrained, save_pretrained
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.errors import InputError
from xiangxin_fast.hf_config import read_config, rotary_factor, write_configs
from xiangxin_fast.layout import slots_of
from xiangxin_fast.model import DEFAULT_DTYPE, Phi
from xiangxin_fast.safetensors_file import write_safetensors
from xiangxin_fast.tokenizer import Tokenizer

CONFIG = PhiConfig(vocab=515, channels=160, layers=3, heads=2, rotary_dim=32, mlp_hidden=640, context=64, eos_id=0)
TIED = PhiConfig(
    vocab=300, channels=192, layers=2, heads=2, rotary_dim=24, mlp_hidden=96, context=32, rope_theta=500.0, eps=1e-3,
    tied_head=True, init_std=0.01, bos_id=3, eos_id=4,
)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def tokens_of(config: PhiConfig) -> torch.Tensor:
    return torch.randint(config.vocab, (2, 24), generator=torch.Generator().manual_seed(1))


def same_weights(a: Phi, b: Phi) -> bool:
    """Whether two models hold the same bits under the same names."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def rename_to_fused(state: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """A native state dict as transformers 4.36 wrote it."""
    fused = {name: tensor for name, tensor in state.items() if "_proj" not in name}
    for name in state:
        if "q_proj" in name:
            q, k, v = (state[name.replace("q_proj", f"{a}_proj")].unflatten(0, (heads, -1)) for a in "qkv")
            by_head = torch.stack([q, k, v], dim=1)  # [H, 3, D, ...]
            fused[name.replace("q_proj", "query_key_value")] = by_head.flatten(0, 2)
    return fused


def rename_to_remote(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A native state dict under the names of phi-2's first code, with the buffer that it kept."""
    remote = {"transformer.h.0.mixer.rotary_emb.inv_freq": torch.ones(16)}
    renames = {
        r"^lm_head": "lm_head.linear", r"^model.final_layernorm": "lm_head.ln", r"^model.layers": "transformer.h",
        r"^model.embed_tokens": "transformer.embd.wte", "input_layernorm": "ln", "dense": "out_proj",
        "self_attn": "mixer", "q_proj": "Wqkv",
    }  # fmt: skip
    for name, tensor in state.items():
        if "q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{a}_proj")] for a in "qkv"])
        for pattern, replacement in renames.items():
            name = re.sub(pattern, replacement, name)
        if "_proj" not in name or "out_proj" in name:
            remote[name] = tensor
    return remote


# The head of phi-2's own config.json before transformers knew the model.
REMOTE_CONFIG = {
    "architectures": ["PhiForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_phi.PhiConfig", "AutoModelForCausalLM": "modeling_phi.PhiForCausalLM"},
    "model_type": "phi-msft",
    "activation_function": "gelu_new",
    "n_embd": 160,
    "n_head": 2,
    "n_head_kv": None,
    "n_inner": None,
    "n_layer": 3,
    "n_positions": 64,
    "rotary_dim": 32,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 515,
    "resid_pdrop": 0.1,
    "torch_dtype": "float16",
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory that transformers' own save_pretrained wrote."""
    oracle(CONFIG).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 200_000], ids=["single", "sharded"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, config, dtype, shard_bytes):
    model = random_model(config, dtype)
    save_pretrained(model, tmp_path, shard_bytes=shard_bytes)
    again = load_pretrained(tmp_path, "cpu", dtype)
    assert again.config == config
    assert same_weights(again, model)
    weights = sorted(path for path in tmp_path.iterdir() if path.suffix == ".safetensors")
    assert len(weights) == 1 if shard_bytes > 200_000 else len(weights) > 2
    if len(weights) > 2:
        assert all(path.stat().st_size < 200_000 or len(load_file(path)) == 1 for path in weights)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 200_000], ids=["single", "sharded"])
def test_transformers_reads_what_we_write(tmp_path, config, shard_bytes):
    model = random_model(config)
    save_pretrained(model, tmp_path, shard_bytes=shard_bytes)
    hf, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert (hf.config.bos_token_id, hf.config.eos_token_id) == (config.bos_id, config.eos_id)
    assert (hf.generation_config.bos_token_id, hf.generation_config.eos_token_id) == (config.bos_id, config.eos_id)
    tokens = tokens_of(config)
    torch.testing.assert_close(hf(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_we_read_what_transformers_writes(tmp_path, config, max_shard_size):
    hf = oracle(config)
    hf.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "200KB")
    model = load_pretrained(tmp_path, "cpu", torch.float32)
    assert same_weights(model, fuse(config, hf.state_dict()))
    tokens = tokens_of(config)
    torch.testing.assert_close(model(tokens), hf(tokens).logits, rtol=1e-5, atol=1e-5)


def write_dir(directory: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def test_the_older_layouts_hold_the_same_model(saved, tmp_path):
    state = load_file(saved / "model.safetensors")
    native = json.loads((saved / "config.json").read_text())
    model = load_pretrained(saved, "cpu", torch.float32)
    for name, config, tensors in (
        ("fused", native, rename_to_fused(state, CONFIG.heads)),
        ("remote", REMOTE_CONFIG, rename_to_remote(state)),
    ):
        again = load_pretrained(write_dir(tmp_path / name, config, tensors), "cpu", torch.float32)
        assert same_weights(again, model), name
        assert again.config == dataclasses.replace(model.config, eos_id=again.config.eos_id), name


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_asked_for_counts_and_not_the_files(saved, tmp_path, stored):
    state = {name: tensor.to(stored) for name, tensor in load_file(saved / "model.safetensors").items()}
    directory = write_dir(tmp_path / "stored", json.loads((saved / "config.json").read_text()), state)
    for dtype in (None, torch.float32, torch.bfloat16, torch.float64):
        model = load_pretrained(directory, "cpu", dtype)
        expected = dtype or DEFAULT_DTYPE
        assert same_weights(model, fuse(CONFIG, {name: tensor.to(expected) for name, tensor in state.items()}))
    with pytest.raises(InputError, match="got fp16"):
        load_pretrained(directory, "cpu", torch.float16)


def test_a_snapshot_of_the_hugging_face_cache_loads(saved, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(saved.iterdir())):
        shutil.move(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    model = load_pretrained(snapshot, "cpu", torch.float32)
    assert same_weights(model, random_model(CONFIG))
    (tmp_path / "elsewhere").symlink_to(snapshot)
    assert same_weights(load_pretrained(tmp_path / "elsewhere", "cpu", torch.float32), model)


def test_code_in_a_directory_is_never_run(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_phi.PhiConfig",
        "AutoModelForCausalLM": "someone/else--modeling_phi.PhiForCausalLM",
    }
    (saved / "config.json").write_text(json.dumps(config))
    trap = f"open({str(tmp_path / 'trapped')!r}, 'w').close()"
    for name in ("configuration_phi.py", "modeling_phi.py", "__init__.py", "sitecustomize.py"):
        (saved / name).write_text(trap)
    load_pretrained(saved, "cpu", torch.float32)
    assert not (tmp_path / "trapped").exists()


def test_nothing_of_a_file_stays_open_or_mapped(saved):
    model = load_pretrained(saved, "cpu", torch.float32)
    opened = [os.path.realpath(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd")]
    assert not [path for path in opened if str(saved) in path]
    assert str(saved) not in Path("/proc/self/maps").read_text()
    os.truncate(saved / "model.safetensors", 0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_config_says_the_rotary_numbers_where_old_and_new_transformers_look(tmp_path):
    write_configs(tmp_path, TIED, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"rope_theta": 500.0, "partial_rotary_factor": 0.25}
    assert config.items() >= expected.items()
    assert config["rope_parameters"] == {"rope_type": "default"} | expected
    assert config["torch_dtype"] == "bfloat16"
    for absent in ("rope_parameters", *expected):
        less = {key: value for key, value in config.items() if key != absent}
        (tmp_path / "config.json").write_text(json.dumps(less))
        assert read_config(tmp_path / "config.json") == TIED
    stale = config | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(stale))
    assert read_config(tmp_path / "config.json") == TIED
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["partial_rotary_factor"] == 0.25


def test_missing_keys_mean_what_they_mean_to_transformers(tmp_path):
    sizes = {"vocab_size": 100, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi", "num_attention_heads": 2} | sizes))
    hf, ours = AutoConfig.from_pretrained(tmp_path), read_config(tmp_path / "config.json")
    assert ours.rotary_dim == int(64 * hf.rope_parameters["partial_rotary_factor"])
    assert (ours.rope_theta, ours.eps, ours.context) == (
        hf.rope_parameters["rope_theta"], hf.layer_norm_eps, hf.max_position_embeddings,
    )  # fmt: skip
    assert (ours.init_std, ours.tied_head) == (hf.initializer_range, hf.tie_word_embeddings)
    # Not transformers' own 1 and 2, which belong to no tokenizer of a Phi.
    assert (ours.bos_id, ours.eos_id) == (None, None)


def test_rotary_dim_survives_the_factor_that_transformers_truncates():
    rounded = 0
    for head_dim in range(2, 257):
        for rotary_dim in range(2, head_dim + 1, 2):
            config = PhiConfig(1, head_dim, 1, 1, rotary_dim, 1)
            assert int(head_dim * rotary_factor(config)) == rotary_dim
            rounded += int(head_dim * (rotary_dim / head_dim)) != rotary_dim
    assert rounded > 0  # the plain quotient would not do


def test_the_tokenizer_travels_with_the_model(tmp_path):
    tokenizer = Tokenizer.train(["三国演义的白话文本，话说天下大势。" * 3, "the quick brown fox"] * 5, vocab=300)
    save_pretrained(random_model(CONFIG), tmp_path, tokenizer)
    text = "话说天下大势，分久必合 the fox <|endoftext|>"
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto.model_max_length == CONFIG.context
    assert auto(text.split("<")[0])["input_ids"] == tokenizer.encode(text.split("<")[0])
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256
    with pytest.raises(InputError, match="expected a tokenizer of at most 10 ids"):
        save_pretrained(random_model(dataclasses.replace(CONFIG, vocab=10)), tmp_path / "small", tokenizer)
    assert not (tmp_path / "small").exists()


def test_saving_again_leaves_nothing_of_the_old_model(tmp_path):
    save_pretrained(random_model(CONFIG), tmp_path, shard_bytes=200_000)
    (tmp_path / "README.md").write_text("a model card")
    save_pretrained(random_model(TIED), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    assert same_weights(load_pretrained(tmp_path, "cpu", torch.float32), random_model(TIED))


@pytest.mark.parametrize("fault", ["disk full", "interrupt", "NaN"])
def test_a_save_that_fails_leaves_the_old_model_whole(tmp_path, monkeypatch, fault):
    old = random_model(CONFIG)
    save_pretrained(old, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    new = random_model(TIED)
    written = []

    def fails_at_the_second_shard(path, *arguments):
        if written:
            path.write_bytes(b"half")
            raise {"disk full": OSError(28, "No space left on device"), "interrupt": KeyboardInterrupt()}[fault]
        written.append(path)
        write_safetensors(path, *arguments)

    if fault == "NaN":
        new.blocks[1].b_out.data[1, 7] = float("nan")
    else:
        monkeypatch.setattr(checkpoint, "write_safetensors", fails_at_the_second_shard)
    error, message = {
        "disk full": (InputError, "No space left on device"),
        "interrupt": (KeyboardInterrupt, None),
        "NaN": (InputError, r"model.layers.1.mlp.fc2.bias: expected finite weights, got 1 NaN or infinite"),
    }[fault]
    with pytest.raises(error, match=message):
        save_pretrained(new, tmp_path, shard_bytes=50_000)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert same_weights(load_pretrained(tmp_path, "cpu", torch.float32), old)


def test_a_save_cut_off_while_files_change_places_is_no_model(tmp_path, monkeypatch):
    save_pretrained(random_model(CONFIG), tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_configs", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(random_model(TIED), tmp_path)
    with pytest.raises(InputError, match=r"expected a file config.json, got none"):
        load_pretrained(tmp_path, "cpu", torch.float32)


LOAD_AND_REPORT = """
import sys, torch
from xiangxin_fast import load_pretrained
model = load_pretrained(sys.argv[1], "cpu", torch.bfloat16)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss has the parent's too
print(sum(p.numel() for p in model.parameters()), int(peak.split()[1]) * 1024)
"""


@pytest.mark.slow
def test_loading_phi_2_takes_less_than_7_gb(tmp_path):
    config = PhiConfig.from_preset("phi-2")
    write_configs(tmp_path, config, torch.bfloat16)
    header, end = {}, 0
    for name, slot in slots_of(config).items():
        start, end = end, end + 2 * math.prod(slot.shape)
        header[name] = {"dtype": "BF16", "shape": slot.shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    # Zeros that take no room on the disk; in memory they take as much as any other numbers.
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    script = [sys.executable, "-c", LOAD_AND_REPORT, str(tmp_path)]
    report = subprocess.run(script, capture_output=True, text=True, check=True, env=os.environ | PATHS)
    parameters, peak = map(int, report.stdout.split())
    assert parameters == 2_779_683_840
    assert end == 2 * parameters
    assert end < peak < 7e9


# From transformers' own tests of Phi: the first 30 logits at the first two positions, and how closely they must agree.
PUBLISHED_TOKENS = [[1212, 318, 281, 1672, 2643, 290, 428, 318, 257, 1332]]
PUBLISHED_LOGITS = {
    "PHI1": (1e-4, [
        [2.2671, 6.7684, -2.0107, -1.2440, -1.5335, -2.3828, 6.9186, 6.4245, 3.1548, 0.9998, 0.0760, 4.4653, 4.9857,
         4.2956, 1.2308, -1.4178, 0.1361, 0.5191, -0.5699, -2.2201, -3.0750, -3.9600, -4.5936, -3.7394, -2.7777,
         6.1874, -0.4148, -1.5684, -0.5967, 0.2395],
        [1.7004, 4.0383, 0.0546, 0.4530, -0.3619, -0.9021, 1.8355, 1.3587, 1.2406, 2.5775, -0.8834, 5.1910, 4.2565,
         4.1406, 3.0752, -0.9099, 1.1595, 0.0264, 0.3243, -1.1803, -1.3945, -2.1406, -3.9939, -1.4438, -2.9546,
         3.9204, 1.0851, -1.0598, -1.7819, -0.4827],
    ]),
    "PHI1_5": (1e-4, [
        [12.2922, 13.3507, 8.6963, 9.1355, 9.3502, 9.2667, 14.2027, 13.1363, 13.5446, 11.1337, 9.9279, 16.7195,
         13.0768, 14.9141, 11.9965, 8.0233, 10.3129, 10.6118, 10.0204, 9.3827, 8.8344, 8.2806, 8.0153, 8.0540,
         7.0964, 16.5743, 11.1256, 9.6987, 11.4770, 10.5440],
        [12.3323, 14.6050, 8.9986, 8.1580, 9.5654, 6.6728, 12.5966, 12.6662, 12.2784, 11.7522, 8.2039, 16.3102,
         11.2203, 13.6088, 12.0125, 9.1021, 9.8216, 10.0987, 9.0926, 8.4260, 8.8009, 7.6547, 6.8075, 7.7881,
         7.4501, 15.7451, 10.5053, 8.3129, 10.0027, 9.2612],
    ]),
    "PHI2": (1e-3, [
        [6.4830, 6.1644, 3.4055, 2.2848, 5.4654, 2.8360, 5.5975, 5.5391, 7.3101, 4.2498, 2.5913, 10.3885, 6.4359,
         8.7982, 5.6534, 0.5150, 2.7498, 3.1930, 2.4334, 1.7781, 1.5613, 1.3067, 0.8291, 0.5633, 0.6522, 9.8191,
         5.5771, 2.7987, 4.2845, 3.7030],
        [6.0642, 7.8242, 3.4634, 1.9259, 4.3169, 2.0913, 6.0446, 3.6804, 6.6736, 4.0727, 2.1791, 11.4139, 5.6795,
         7.5652, 6.2039, 2.7174, 4.3266, 3.6930, 2.8058, 2.6721, 2.3047, 2.0848, 2.0972, 2.0441, 1.3160, 9.2085,
         4.5557, 3.0296, 2.6045, 2.4059],
    ]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_LOGITS)
def test_published_checkpoints_give_the_published_logits(name):
    variable = f"XIANGXIN_{name}_DIR"
    if variable not in os.environ:
        pytest.skip(f"set {variable} to the published checkpoint's directory")
    tolerance, expected = PUBLISHED_LOGITS[name]
    with torch.no_grad():
        logits = load_pretrained(os.environ[variable], "cpu", torch.float32)(torch.tensor(PUBLISHED_TOKENS))
    torch.testing.assert_close(logits[0, :2, :30], torch.tensor(expected), rtol=tolerance, atol=tolerance)

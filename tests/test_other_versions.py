"""What we write, older transformers and tokenizers read; what transformers 4.36 wrote, we read.

Each version runs in a process of its own over this environment's torch, from a directory that pip fills once, under
$XDG_CACHE_HOME. Needs a package index the first time.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hf import random_model
from tests.test_checkpoint import CONFIG, TIED, rename_to_fused, rename_to_remote, tokens_of, write_dir
from xiangxin_fast import load_pretrained, save_pretrained
from xiangxin_fast.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

SHARED = [
    "huggingface_hub==0.36.0",
    "requests==2.32.5",
    "urllib3==2.5.0",
    "charset_normalizer==3.4.4",
    "certifi==2025.10.5",
]
VERSIONS = {
    "4.36.2": ["transformers==4.36.2", "tokenizers==0.15.2", *SHARED],
    "4.37.0": ["transformers==4.37.0", "tokenizers==0.15.2", *SHARED],
    "4.57.1": ["transformers==4.57.1", "tokenizers==0.22.1", *SHARED],
}


def packages(version: str) -> Path:
    """A directory holding that version of transformers and what it needs, installed if it is not yet there."""
    requirements = VERSIONS[version]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xiangxin-fast"
    home = cache / f"transformers-{version}-{hashlib.sha256(' '.join(requirements).encode()).hexdigest()[:12]}"
    if not home.exists():
        partial = home.with_name(f"{home.name}.{os.getpid()}.partial")
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(partial), *requirements]
        subprocess.run(pip, check=True, capture_output=True, text=True)
        try:
            partial.rename(home)
        except OSError:  # another process was first
            assert home.exists()
    return home


def run_under(version: str, script: str, *arguments: Path | str) -> None:
    """Runs `script` with that version of transformers; its output shows when it fails."""
    command = [sys.executable, "-c", script, version, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(packages(version))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


READ = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
version, directory, work = sys.argv[1:]
assert transformers.__version__ == version
model, report = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32, output_loading_info=True)
assert not any(report.values()), report
tokens = load_file(f"{work}/tokens.safetensors")["tokens"]
with torch.no_grad():
    save_file({"logits": model(tokens).logits}, f"{work}/logits.safetensors")
texts = json.load(open(f"{work}/texts.json"))
tokenizer = AutoTokenizer.from_pretrained(directory)
ids = [tokenizer(text)["input_ids"] for text in texts]
json.dump([ids, [tokenizer.decode(i) for i in ids]], open(f"{work}/ids.json", "w"))
"""

TEXTS = ["话说天下大势，分久必合，合久必分。", "the quick  brown fox\n\n\tjumps 12345!", "年轻人🙂 e\u0301"]


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("version", ["4.37.0", "4.57.1"])
def test_older_transformers_read_what_we_write(tmp_path, version, config):
    model = random_model(config)
    tokenizer = Tokenizer.train(TEXTS * 5, vocab=290)
    save_pretrained(model, tmp_path / "model", tokenizer)
    tokens = tokens_of(config)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    run_under(version, READ, tmp_path / "model", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            load_file(tmp_path / "logits.safetensors")["logits"], model(tokens), rtol=1e-5, atol=1e-5
        )
    ids, texts = json.loads((tmp_path / "ids.json").read_text())
    assert ids == [tokenizer.encode(text) for text in TEXTS]
    assert texts == TEXTS


WRITE = """
import sys
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import PhiConfig, PhiForCausalLM
version, work = sys.argv[1:]
assert transformers.__version__ == version
torch.manual_seed(0)
model = PhiForCausalLM(PhiConfig(
    vocab_size=99, hidden_size=160, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    partial_rotary_factor=0.4, max_position_embeddings=64, rope_theta=500.0,
)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_(0, 0.1)
    tokens = torch.randint(99, (2, 24))
    save_file({"tokens": tokens, "logits": model(tokens).logits}, f"{work}/expected.safetensors")
model.save_pretrained(f"{work}/model", safe_serialization=True)
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_we_read_what_older_transformers_wrote(tmp_path, version):
    run_under(version, WRITE, tmp_path)
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert any("query_key_value" in name for name in names) == (version == "4.36.2")
    expected = load_file(tmp_path / "expected.safetensors")
    with torch.no_grad():
        logits = load_pretrained(tmp_path / "model", "cpu", torch.float32)(expected["tokens"])
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)


CONVERT = """
import sys
import transformers
from safetensors.torch import load_file, save_file
from transformers import PhiConfig
from transformers.models.phi.convert_phi_weights_to_hf import PHI_MAPPING, convert_weights
version, directory, work = sys.argv[1:]
assert transformers.__version__ == version
config = PhiConfig(hidden_size=160, num_attention_heads=2)
converted = convert_weights(load_file(f"{directory}/model.safetensors"), PHI_MAPPING, config)
save_file({name: tensor.contiguous() for name, tensor in converted.items()}, f"{work}/fused.safetensors")
"""


def test_the_oldest_layouts_are_those_of_transformers_own_converter(tmp_path):
    """What test_checkpoint calls "remote" converts to what it calls "fused", by the converter of the time."""
    save_pretrained(random_model(CONFIG), tmp_path / "native")
    state = load_file(tmp_path / "native" / "model.safetensors")
    remote = write_dir(tmp_path / "remote", {}, rename_to_remote(state))
    run_under("4.37.0", CONVERT, remote, tmp_path)
    converted, expected = load_file(tmp_path / "fused.safetensors"), rename_to_fused(state, CONFIG.heads)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)

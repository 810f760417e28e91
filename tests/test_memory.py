"""Too little memory, wherever it shows: one line with what is needed and what would fit."""

import re

import pytest
import torch

from tests.command_line import run, write_model
from tests.hf import random_model
from tests.test_generate import PHI_2
from xiangxin_fast import checkpoint, decode_batch, load_pretrained
from xiangxin_fast.cli import score
from xiangxin_fast.decode_batch import DecodeBatch
from xiangxin_fast.errors import InputError
from xiangxin_fast.generator import Generator
from xiangxin_fast.memory import lacks_memory
from xiangxin_fast.model import Phi

LACKS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nmore lines"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
}
OTHER = RuntimeError("CUDA error: an illegal memory access was encountered")


def raises(error: Exception):
    def instead(*_, **__):
        raise error

    return instead


@pytest.fixture(scope="module")
def model() -> Phi:
    return random_model(PHI_2)


@pytest.mark.parametrize("error", LACKS.values(), ids=LACKS)
@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_generating_tells_what_is_needed_and_what_would_fit(model, monkeypatch, where, error):
    monkeypatch.setattr(decode_batch, "free_bytes", lambda device: 0)
    monkeypatch.setattr(decode_batch, "working_bytes", lambda model: 2 * 10**5)
    prompts = [[1, 2]] * 4
    generator, real = Generator(model, rows=4), getattr(Phi, where)
    monkeypatch.setattr(Phi, where, raises(error))
    cache = 4 * 64 * 2 * 3 * 160 * 4 / 1e9
    needs = f"4 rows of 64 tokens need {cache:.2f} GB, and about 0.00 GB to compute in, beside"
    with pytest.raises(InputError, match=re.escape(needs)) as told:
        generator.generate(prompts)
    line = str(error).partition("\n")[0]
    assert str(told.value).endswith(f": 3 rows of 64 tokens or 4 rows of 32 would fit ({line})")
    assert generator._idle is None  # a smaller batch may find room
    monkeypatch.setattr(Phi, where, real)
    assert len(generator.generate(prompts[:1], max_new_tokens=3)[0]) == 3


def test_buffers_beside_the_cache(model, monkeypatch):
    monkeypatch.setattr(DecodeBatch, "_allocate_buffers", raises(LACKS["torch"]))
    with pytest.raises(InputError, match=r"^KV cache: 1 rows of 64 tokens need .* would fit$"):
        Generator(model).generate([[1, 2]])


@pytest.mark.parametrize("method", ["_allocate_buffers", "step"])
def test_an_error_of_another_kind_stays_what_it_is(model, monkeypatch, method):
    monkeypatch.setattr(DecodeBatch, method, raises(OTHER))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Generator(model).generate([[1, 2]])


def test_what_follows_a_lack_of_memory_is_one():
    """A graph whose capture fails for it ends in an error about the capture."""
    failed = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert not lacks_memory(failed)
    failed.__context__ = LACKS["Triton"]
    assert lacks_memory(failed)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_loading_tells_what_is_needed(tmp_path, monkeypatch, quantize):
    directory = write_model(tmp_path / "m")
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 10**6)
    monkeypatch.setattr(checkpoint, "place", raises(LACKS["torch"]))
    with pytest.raises(
        InputError, match=r"of free memory on cpu for the weights, got 0\.00 GB; .* would fit \(CUDA out"
    ):
        load_pretrained(directory, "cpu", quantize=quantize)
    monkeypatch.setattr(checkpoint, "place", raises(OTHER))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        load_pretrained(directory, "cpu")


def test_scoring_tells_what_is_needed_and_what_would_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Phi, "hidden", raises(LACKS["torch"]))
    token = (7 * 160 + 2 * 320 + 320) * 4 + 320 * 8
    monkeypatch.setattr(score, "free_bytes", lambda device: 3 * token)
    done = run(capsys, write_model(tmp_path / "m"), "--score", "0123456789")
    needs = r"error: --score: \d+ tokens at once need about 0\.00 GB beside the weights, got 0\.00 GB free on cpu"
    fits = r"a text of 3 tokens would fit \(CUDA out of memory\. Tried to allocate 20 MiB\.\)\n"
    assert done.code == 2
    assert re.fullmatch(f"{needs}: {fits}", done.err)

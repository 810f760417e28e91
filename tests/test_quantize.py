"""Models of int8 and int4 weights: their logits, the directories they are written to, and what is refused."""

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from xiangxin_kernels import QuantizedWeight, _cpu, dequantize, unpacked

from tests.hf import random_model
from tests.numerics import assert_no_worse_than_torch
from tests.test_cached_logits import cached_logits
from tests.test_checkpoint import PATHS
from tests.test_generate import prompts_of
from xiangxin_fast import load_pretrained, quantize, save_pretrained
from xiangxin_fast.checkpoint import quantize_directory
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.errors import InputError
from xiangxin_fast.generator import Generator
from xiangxin_fast.hf_config import read_config, read_quantization, write_configs
from xiangxin_fast.layout import slots_of
from xiangxin_fast.model import Phi
from xiangxin_fast.quantization import ROUNDED, place, quantize_model
from xiangxin_fast.tokenizer import Tokenizer

# 3C + F, C and vocab are multiples of 64, so that bf16 matrices become column blocks where they may.
CONFIG = PhiConfig(vocab=320, channels=192, layers=2, heads=2, rotary_dim=32, mlp_hidden=384, context=64, eos_id=0)
KINDS = ["int8", "int4"]


@pytest.fixture(autouse=True)
def no_bf16(monkeypatch):
    """A CPU without bf16 arithmetic, whichever this one is: column blocks are for it alone."""
    monkeypatch.setattr(_cpu, "_has_bf16", lambda: False)


needs_bf16 = pytest.mark.skipif(not _cpu._has_bf16(), reason="oneDNN lays bf16 out for CPUs that multiply it alone")


def bf16_model() -> Phi:
    return random_model(CONFIG, torch.bfloat16)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_pretrained(bf16_model(), tmp_path / "bf16", Tokenizer.train(["the quick brown fox " * 5], 270))
    return tmp_path / "bf16"


def dequantized(model: Phi, dtype: torch.dtype) -> Phi:
    """A plain model in `dtype` of the numbers that the rounded one stands for."""
    plain = Phi(model.config, "meta", dtype)
    for name, _ in list(plain.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = getattr(model.get_submodule(owner), leaf)
        rounded = isinstance(value, QuantizedWeight)
        place(plain, name, dequantize(value, dtype) if rounded else value.detach().to(dtype))
    return plain


def parts_of(model: Phi) -> dict[str, torch.Tensor]:
    """Every tensor of a rounded model."""
    found = dict(model.named_parameters())
    for owner, module in model.named_modules():
        for name in ROUNDED:
            if isinstance(value := getattr(module, name, None), QuantizedWeight):
                found |= {f"{owner}.{name}.codes": value.codes, f"{owner}.{name}.scale": value.scale}
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["as read", "packed"])
@pytest.mark.parametrize("context", [CONFIG.context, pytest.param(2048, marks=pytest.mark.slow)])
def test_logits_are_those_of_the_dequantized_model(kind, packed, context):
    """Whole passes and cached steps at every position, against the numerics rule."""
    config = dataclasses.replace(CONFIG, context=context)
    model = quantize_model(random_model(config, torch.bfloat16), kind)
    tokens = torch.tensor(prompts_of(config, context)[0])
    with torch.no_grad():
        plain = dequantized(model, torch.bfloat16)(tokens[None])[0]
        exact = dequantized(model, torch.float64)(tokens[None])[0]
        model = model.prepack() if packed else model
        assert_no_worse_than_torch(model(tokens[None])[0], plain, exact, what="quantized.logits")
    cached = cached_logits(model, tokens, 5, 1).bfloat16()
    assert_no_worse_than_torch(cached, plain[4:], exact[4:], what="quantized.cached")


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_comes_back_bit_for_bit(directory, tmp_path, kind):
    """Rounded while it is read, in memory, or once into a directory: the same codes."""
    quantize_directory(directory, tmp_path / "out", kind)
    expected = parts_of(quantize_model(bf16_model(), kind))
    assert len([name for name in expected if name.endswith(".codes")]) == 2 * CONFIG.layers + 1
    for model in (load_pretrained(tmp_path / "out", "cpu"), load_pretrained(directory, "cpu", quantize=kind)):
        found = parts_of(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert read_config(tmp_path / "out/config.json") == CONFIG
    load_pretrained(tmp_path / "out", "cpu", quantize=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_were_laid_out_anew_are_rounded_alike(kind):
    expected, packed = (
        parts_of(quantize_model(bf16_model(), kind)),
        parts_of(quantize_model(bf16_model().prepack(), kind)),
    )
    assert expected.keys() == packed.keys()
    assert all(torch.equal(packed[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_sample_is_the_same_in_any_company(directory, kind):
    generator = Generator(load_pretrained(directory, "cpu", quantize=kind))
    prompts = prompts_of(CONFIG, 20, 3, 17, 1)
    together = generator.complete(prompts, max_new_tokens=12, temperature=0, stop_ids=())
    for prompt, completion in zip(prompts, together, strict=True):
        assert generator.complete([prompt], max_new_tokens=12, temperature=0, stop_ids=())[0] == completion


@pytest.mark.parametrize("has_bf16", [False, pytest.param(True, marks=needs_bf16)])
def test_a_generator_leaves_a_bf16_model_whole(directory, tmp_path, has_bf16, monkeypatch):
    """Its matrices are laid out anew then; logits, losses, gradients and what is saved are still the model's."""
    monkeypatch.setattr(_cpu, "_has_bf16", lambda: has_bf16)
    model, plain = load_pretrained(directory, "cpu"), bf16_model()
    tokens = torch.tensor(prompts_of(CONFIG, 20)[0])[None]
    Generator(model)
    for weight in (model.blocks[0].w_in, model.blocks[1].w_out, model.head_w):
        assert weight.is_mkldnn if has_bf16 else weight.dim() == 3
    models = (model, plain, bf16_model().double())
    assert_no_worse_than_torch(*(m(tokens).detach() for m in models), what="packed.logits")
    assert_no_worse_than_torch(*(m.loss(tokens, tokens).detach() for m in models), what="packed.loss")
    for _ in range(2):  # the second adds to the first
        for each in models:
            each.loss(tokens, tokens).backward()
    for (name, packed), *others in zip(model.named_parameters(), *(m.parameters() for m in models[1:]), strict=True):
        assert_no_worse_than_torch(unpacked(packed.grad), *(p.grad for p in others), what=f"packed.{name}")
    save_pretrained(model, tmp_path / "again")
    again, before = (load_file(path / "model.safetensors") for path in (tmp_path / "again", directory))
    assert all(torch.equal(again[name], before[name]) for name in before)


def break_entry(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


DAMAGE = {
    "missing": (lambda t: t.pop("head_w.scale"), r"'head_w.scale' BF16 \[320\], got no such tensor"),
    "extra": (lambda t: t.update(more=torch.ones(2)), r"'more' no such tensor, got F32 \[2\]"),
    "dtype": (
        lambda t: t.update({"blocks.0.w_in.codes": t["blocks.0.w_in.codes"].float()}),
        r"I8 \[960, 192\], got F32",
    ),
    "shape": (lambda t: t.update({"blocks.1.w_out.scale": torch.ones(7).bfloat16()}), r"BF16 \[192\], got BF16 \[7\]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_refused(directory, tmp_path, damage):
    quantize_directory(directory, tmp_path / "out", "int8")
    change, message = DAMAGE[damage]
    break_entry(tmp_path / "out", change)
    with pytest.raises(InputError, match=rf"out: expected .*{message}"):
        load_pretrained(tmp_path / "out", "cpu")


def test_a_scale_that_is_no_number_is_named(directory, tmp_path):
    quantize_directory(directory, tmp_path / "out", "int8")
    break_entry(tmp_path / "out", lambda tensors: tensors["blocks.1.w_in.scale"].fill_(math.nan))
    with pytest.raises(InputError, match=r"blocks.1.w_in: expected finite weights, got 960 NaN"):
        load_pretrained(tmp_path / "out", "cpu", check_finite=True)


@pytest.mark.parametrize(
    "record",
    [
        {"quant_method": "xiangxin", "layout": 2, "bits": 8, "group": 64},
        {"quant_method": "xiangxin", "layout": 2, "bits": 4, "group": 48},
        {"quant_method": "xiangxin", "layout": 2, "bits": 4, "group": 64, "more": 1},
        {"quant_method": "xiangxin", "layout": 1, "bits": 4, "group": 64},
        {"quant_method": "xiangxin", "bits": 4, "group": 64},
        {"quant_method": "gptq", "layout": 2, "bits": 4, "group": 64},
        "int8",
    ],
    ids=str,
)
def test_a_record_that_is_not_ours_is_refused(directory, record):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": record}))
    with pytest.raises(InputError, match="expected quantization_config null or that of"):
        load_pretrained(directory, "cpu")


def test_what_does_not_fit_is_refused(directory, tmp_path):
    quantize_directory(directory, out := tmp_path / "out", "int4")
    narrow = PhiConfig(vocab=8, channels=80, layers=1, heads=1, rotary_dim=32, mlp_hidden=80)
    save_pretrained(Phi(narrow, dtype=torch.bfloat16).init_weights(), tmp_path / "narrow")
    odd = dataclasses.replace(CONFIG, mlp_hidden=385)
    for action, message in {
        lambda: load_pretrained(out, "cpu", quantize="int8"): "expected weights to round to int8, got int4",
        lambda: load_pretrained(out, "cpu", torch.float32): "expected bf16 to compute in, got torch.float32",
        lambda: load_pretrained(directory, "cpu", quantize="int2"): "expected int8 or int4, got 'int2'",
        lambda: load_pretrained(tmp_path / "narrow", "cpu", quantize="int4"): "a multiple of 32 columns",
        lambda: quantize_directory(out, tmp_path / "twice", "int4"): "expected weights as they were trained, got int4",
        lambda: quantize_directory(directory, directory, "int8"): "expected a directory other than the one read",
        lambda: quantize_directory(directory, tmp_path / "x", "int8", 32): "expected a group with int4 only",
        lambda: quantize_directory(directory, tmp_path / "x", "int4", 128): "that divides 192 and 576, got 128",
        lambda: save_pretrained(load_pretrained(out, "cpu"), tmp_path / "x"): "got one with rounded weights",
        lambda: quantize_model(random_model(CONFIG), "int8"): "expected bf16 to compute in",
        lambda: quantize_model(
            random_model(odd, torch.bfloat16), "int8"
        ): "multiples of 4 columns for 8 bits, got 192 and 577",
    }.items():
        with pytest.raises(InputError, match=message):
            action()


def test_the_command_line(directory, tmp_path, capsys):
    quantize.main([str(directory), str(tmp_path / "out"), "--bits", "4", "--group", "32"])
    assert re.search(r"out: 0.00 GB of weights, from 0.00 GB\n", capsys.readouterr().out)
    assert read_quantization(tmp_path / "out/config.json") == (4, 32)
    assert Tokenizer.load(tmp_path / "out").encode("the fox") == Tokenizer.load(directory).encode("the fox")
    (directory / "tokenizer.json").unlink()
    quantize.main([str(directory), str(tmp_path / "out")])
    assert "has no tokenizer" in capsys.readouterr().out
    assert read_quantization(tmp_path / "out/config.json") == (8, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IN", "OUT", "--bits", "5"], "invalid choice '5' for argument '--bits'"),
        (["IN", "OUT", "--group", "64"], "expected a group with int4 only, got 64 with int8"),
        (["IN"], "OUT"),
        (["nowhere", "OUT"], "expected a model directory, got nothing"),
    ],
)
def test_a_bad_command_line_is_one_line(directory, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    places = {"IN": str(directory), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as end:
        quantize.main([places.get(argument, argument) for argument in arguments])
    assert end.value.code == 2
    assert message in stderr.getvalue()
    assert stderr.getvalue().count("\n") == 1


def test_help_needs_no_torch():
    code = "import sys, xiangxin_fast.quantize as q\ntry: q.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | PATHS)
    assert done.returncode == 0
    assert done.stdout.endswith("False\n")


LOAD_AND_REPORT = """
import sys, torch
from xiangxin_fast import Generator, load_pretrained
Generator(load_pretrained(sys.argv[1], "cpu", quantize=sys.argv[2]))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss has the parent's too
print(int(peak.split()[1]) * 1024)
"""


@pytest.mark.slow
def test_phi_2_is_rounded_in_less_memory_than_it_takes_as_it_is(tmp_path):
    """3.1 GB of weights, embedding included, of 5.6 GB that are read; 4.4 GB at the peak when it was measured."""
    config = PhiConfig.from_preset("phi-2")
    write_configs(tmp_path, config, torch.bfloat16)
    header, end = {}, 0
    for name, slot in slots_of(config).items():
        start, end = end, end + 2 * math.prod(slot.shape)
        header[name] = {"dtype": "BF16", "shape": slot.shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    script = [sys.executable, "-c", LOAD_AND_REPORT, str(tmp_path), "int8"]
    report = subprocess.run(script, capture_output=True, text=True, check=True, env=os.environ | PATHS)
    assert int(report.stdout) < 5.0e9


def test_a_generator_lays_out_anew_the_weights_of_a_model_in_evaluation_mode_alone(monkeypatch):
    """An optimizer of a model in training knows its parameters by their shapes."""
    monkeypatch.setattr("xiangxin_fast.model.prepack", lambda weight: weight.flatten())
    model = Phi(PhiConfig.from_preset("demo"), "meta")
    shape = model.blocks[0].w_in.shape
    Generator(model)
    assert model.blocks[0].w_in.shape == shape
    Generator(model.eval())
    assert model.blocks[0].w_in.shape == (shape.numel(),)

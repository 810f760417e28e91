"""What --benchmark measures: its arithmetic, its turns, its peer, and its command line."""

import itertools
import json
import math
import re
import sys

import pytest
import torch

from tests.command_line import CONFIG, run, write_model
from tests.hf import random_model
from tests.numerics import assert_no_worse_than_torch
from xiangxin_fast import benchmark, hf_peer
from xiangxin_fast.benchmark import Contender, Measured, Turn, copy_bytes_per_s, measure, ours, transformers
from xiangxin_fast.cli import benchmark as cli_benchmark
from xiangxin_fast.cli import engine as cli_engine
from xiangxin_fast.cli.arguments import parse
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.errors import InputError
from xiangxin_fast.generator import Generator
from xiangxin_fast.hf_config import Quantization, write_configs
from xiangxin_fast.hf_peer import causal_lm
from xiangxin_fast.model import Phi
from xiangxin_fast.quantization import quantization_of, quantize_model, weight_bytes


class TestTurn:
    def test_two_sequences(self):
        """The second begins at 3 s; since then came 3 tokens in 6 s: 2 s for each, a step of two sequences 4 s."""
        arrivals = [(1.0, 0), (2.0, 0), (3.0, 1), (5.0, 0), (7.0, 1), (9.0, 1)]
        assert Turn.of(arrivals, rows=2, new_tokens=3) == Turn(first=1.0, prefill=3.0, step=4.0)

    def test_one_token_has_no_step(self):
        assert Turn.of([(1.5, 0)], rows=1, new_tokens=1) == Turn(1.5, 1.5, None)

    def test_a_token_too_few_is_no_measurement(self):
        with pytest.raises(RuntimeError, match="expected 1 x 3 tokens, got 2"):
            Turn.of([(1.0, 0), (2.0, 0)], rows=1, new_tokens=3)


class TestBytes:
    """The weights that a step must read are all but the embedding: 5.30 GB of phi-2, and 327,680 bytes a position."""

    def test_phi_2(self):
        with torch.device("meta"):
            model = Phi(PhiConfig.from_preset("phi-2"), dtype=torch.bfloat16)
        contender = ours(model, 1)
        assert contender.weight_bytes == 2 * (2_779_683_840 - 51200 * 2560)
        assert contender.step_bytes(rows=3, positions=100.5) == contender.weight_bytes + 327_680 * 3 * 100.5

    @pytest.mark.parametrize("kind", [None, "int8", "int4"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_quantized(self, kind, tied):
        """The check of free memory counts the same, and the embedding besides."""
        config = PhiConfig(vocab=320, channels=128, layers=2, heads=2, rotary_dim=32, mlp_hidden=320, tied_head=tied)
        model = random_model(config, torch.bfloat16)
        contender = ours(quantize_model(model, kind) if kind else model, 1)
        embedding = 0 if tied else 2 * 320 * 128
        rounding = quantization_of(kind, config) if kind else None
        assert contender.weight_bytes == weight_bytes(config, torch.bfloat16, rounding) - embedding
        matrices = 2 * (704 * 128 + 128 * 448) + (0 if tied else 320 * 128)
        each = {None: 2, "int8": 1, "int4": 0.5 + 2 / 64}[kind]
        scales = 2 * (2 * (704 + 128) + (0 if tied else 320)) if kind == "int8" else 0
        assert contender.weight_bytes == 2 * (config.parameters - matrices) - embedding + matrices * each + scales

    def test_the_share_is_of_the_mean_length(self):
        found = Measured(2, 10, 4, [Turn(1, 1, 0.5), Turn(1, 1, 0.25), Turn(1, 1, 0.125)])
        contender = Contender(None, CONFIG, weight_bytes=1000, cache_itemsize=2)
        assert found.bytes_per_s(contender) == (1000 + 2 * 2 * 160 * 2 * 2 * 12) / 0.25
        assert (found.decode_tokens_per_s, found.prefill_tokens_per_s) == (8, 20)

    def test_a_copy_reads_and_writes(self, monkeypatch):
        clock = iter(range(100))
        monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
        assert copy_bytes_per_s(torch.device("cpu"), copy_bytes=1000) == 2000
        monkeypatch.setattr(benchmark, "free_bytes", lambda device: 12_000)
        assert copy_bytes_per_s(torch.device("cpu")) == 6000


class TestTurns:
    def contender(self, seen: list, name: str, error: Exception | None = None) -> Contender:
        def run(prompts, new_tokens):
            seen.append((name, prompts))
            if error:
                raise error
            return [(float(i), row) for i in range(new_tokens) for row in range(len(prompts))]

        return Contender(run, CONFIG, 0, 4)

    def test_alternate_on_prompts_that_nobody_has_seen(self):
        seen, ticks = [], []
        contenders = {name: self.contender(seen, name) for name in "ab"}
        options = {"rows": 3, "prompt_tokens": 5, "new_tokens": 2, "rounds": 3}
        found, failed = measure(contenders, **options, after_turn=lambda: ticks.append(0))
        assert "".join(name for name, _ in seen) == "abbaabba"
        assert len(ticks) == 8
        rounds = [seen[i][1] for i in range(0, 8, 2)]
        assert rounds == [seen[i][1] for i in range(1, 8, 2)]
        assert all(rounds[i] != rounds[j] for i in range(4) for j in range(i))
        assert all(len({prompt[0] for prompt in prompts}) == 3 for prompts in rounds)
        assert len(found["a"].turns) == 3
        assert failed == {}

    def test_one_that_cannot_run_costs_itself(self):
        seen = []
        contenders = {
            "a": self.contender(seen, "a"),
            "b": self.contender(seen, "b", InputError("too little memory")),
            "c": self.contender(seen, "c", torch.OutOfMemoryError("CUDA out of memory.\nTried to")),
        }
        found, failed = measure(contenders, rows=1, prompt_tokens=2, new_tokens=2, rounds=2)
        assert list(found) == ["a"]
        assert failed == {"b": "too little memory", "c": "OutOfMemoryError: CUDA out of memory."}
        assert len(seen) == 5


class TestPeer:
    @pytest.mark.parametrize("share", [False, True])
    @pytest.mark.parametrize("tied", [False, True])
    def test_it_has_our_weights(self, share, tied):
        config = PhiConfig(**vars(CONFIG) | {"tied_head": tied})
        model = random_model(config)
        hf = causal_lm(model, share=share)
        tokens = torch.randint(config.vocab, (2, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            plain, actual = model(tokens), hf(tokens).logits
            exact = random_model(config).double()(tokens)
        assert_no_worse_than_torch(actual, plain, exact, what="hf_peer.logits")
        ours_, theirs = ({t.untyped_storage().data_ptr() for t in m.parameters()} for m in (model, hf))
        assert bool(ours_ & theirs) == share

    def test_both_choose_the_same_tokens(self):
        """So what is measured is the same work; in fp32, where no rounding decides."""
        model = random_model(CONFIG)
        hf = causal_lm(model)
        chosen = []
        monkey = hf.generate
        hf.generate = lambda *a, **k: chosen.append(monkey(*a, **k)) or chosen[-1]
        prompts = benchmark.random_prompts(CONFIG, 2, 9, seed=1)
        arrivals = transformers(hf, CONFIG).run(prompts, 6)
        assert [row for _, row in arrivals] == [0, 1] * 6
        assert all(a <= b for (a, _), (b, _) in itertools.pairwise(arrivals))
        expected = Generator(model).generate(prompts, max_new_tokens=6, temperature=0, stop_ids=())
        assert chosen[0][:, 9:].tolist() == expected


class TestCommandLine:
    SIZES = ("--benchmark", "--preset", "demo", "--benchmark-rounds", "1", "--max-new-tokens", "3")

    @pytest.fixture(autouse=True)
    def _known_bandwidth(self, monkeypatch):
        monkeypatch.setattr(cli_benchmark, "copy_bytes_per_s", lambda device: 1e10)

    def test_json(self, capsys):
        done = run(capsys, None, *self.SIZES, "--json", "--benchmark-rows", "2", "1", "--benchmark-prompts", "5", "300")
        about, *records = map(json.loads, done.out.splitlines())
        config = PhiConfig.from_preset("demo")
        assert (about["parameters"], about["dtype"], about["copy_bytes_per_s"]) == (config.parameters, "float32", 1e10)
        assert [(r["rows"], r["prompt_tokens"]) for r in records] == [(1, 5), (2, 5), (1, 300), (2, 300)]
        assert {r["reason"] for r in records[2:]} == {"the model's context is 256 tokens"}
        for record in records[:2]:
            weights = 4 * (config.parameters - config.vocab * config.channels)
            cache = 4 * 2 * config.layers * config.channels * record["rows"] * (5 + 3 / 2)
            share = (weights + cache) / record["step_s"] / 1e10
            assert record["of_copy_bandwidth"] == pytest.approx(share, rel=1e-12)
            assert record["decode_tokens_per_s"] == pytest.approx(record["rows"] / record["step_s"], rel=1e-12)
            assert 0 < record["first_token_s"] < math.inf

    def test_table_beside_transformers(self, capsys):
        done = run(capsys, None, *self.SIZES, "--against", "hf", "--benchmark-rows", "1", "--benchmark-prompts", "5")
        rows = [line.split() for line in done.out.splitlines() if "1 x 5" in line]
        assert [row[3] for row in rows] == ["ours", "transformers"]
        assert all(cell.endswith("x") for cell in rows[1][-2:])
        assert max(map(len, done.out.splitlines())) <= 80
        assert "…" not in done.out

    def test_quantized_weights_of_a_directory(self, tmp_path, capsys):
        options = ("--quantize", "int8", "--dtype", "bfloat16", *self.SIZES[3:], "--json", "--benchmark-prompts", "5")
        done = run(capsys, write_model(tmp_path / "m"), "--benchmark", *options)
        about, record = map(json.loads, done.out.splitlines())
        assert (about["quantize"], about["model"], record["rows"]) == ("int8", str(tmp_path / "m"), 1)

    def test_transformers_that_are_not_there(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers.models.phi", None)
        done = run(capsys, None, *self.SIZES, "--against", "hf")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "--against hf: expected a transformers that works (pip install transformers), got" in done.err

    def test_too_little_memory_for_it_is_not_laid_to_transformers(self, capsys, monkeypatch):
        def out_of_memory(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nmore lines")

        monkeypatch.setattr(hf_peer, "causal_lm", out_of_memory)
        monkeypatch.setattr(cli_benchmark, "free_bytes", lambda device: 10**9)
        done = run(capsys, None, *self.SIZES, "--against", "hf")
        assert (done.code, done.err.count("\n")) == (2, 1)
        own = r"expected 0\.0\d GB of memory for transformers' own weights, got 1\.00 GB free on cpu \(OutOfMemoryError"
        assert re.search(own, done.err)
        assert "pip install" not in done.err

    def test_an_unknown_preset(self, capsys):
        done = run(capsys, None, "--benchmark", "--preset", "phi-9")
        assert (done.code, done.err) == (2, f"error: config: expected a preset of {PRESET_NAMES}, got 'phi-9'\n")

    def test_interruption_prints_what_is_measured(self, capsys, monkeypatch):
        turns = []

        def interrupted(*arguments, **options):
            turns.append(0)
            if len(turns) == 2:
                raise KeyboardInterrupt
            return measure(*arguments, **options)

        monkeypatch.setattr(cli_benchmark, "measure", interrupted)
        done = run(capsys, None, *self.SIZES, "--benchmark-rows", "1", "2", "--benchmark-prompts", "5")
        assert done.code == 130
        assert "1 x 5" in done.out


PRESET_NAMES = "xiangxin-3b, phi-2, phi-1_5, demo"


class TestMemory:
    def test_too_little_names_what_would_fit(self, monkeypatch):
        monkeypatch.setattr(cli_engine, "free_bytes", lambda device: int(3e9))
        config, gpu = PhiConfig.from_preset("phi-2"), torch.device("cuda")
        expected = (
            r"expected 5\.56 GB of free memory on cuda for the weights, got 3\.00 GB; --quantize int8 \(2\.91 GB\) or "
            r"--quantize int4 \(1\.67 GB\) or --device cpu would fit"
        )
        with pytest.raises(InputError, match=expected):
            cli_engine.require_memory(config, gpu, None, None)
        cli_engine.require_memory(config, gpu, None, "int8")
        cli_engine.require_memory(config, torch.device("cpu"), None, None)

    @pytest.mark.parametrize("bits", [(8, None), (4, 64)])
    def test_weights_that_are_rounded_already_need_less(self, tmp_path, monkeypatch, bits):
        config, gpu, recorded = PhiConfig.from_preset("phi-2"), torch.device("cuda"), Quantization(*bits)
        write_configs(tmp_path, config, torch.bfloat16, recorded)
        (tmp_path / "tokenizer.json").write_bytes((write_model(tmp_path / "m") / "tokenizer.json").read_bytes())
        machine = parse(["--model", str(tmp_path), "x"]).machine
        engine = cli_engine.Engine(tmp_path, machine)
        monkeypatch.setattr(cli_engine, "default_device", lambda: gpu)
        monkeypatch.setattr(cli_engine, "load_pretrained", lambda *_, **__: "loaded")
        monkeypatch.setattr(cli_engine, "free_bytes", lambda device: int(3e9))
        assert engine.model == "loaded"
        del engine.model
        monkeypatch.setattr(cli_engine, "free_bytes", lambda device: int(1e9))
        with pytest.raises(InputError, match=r"for the weights, got 1\.00 GB; --device cpu would fit"):
            _ = engine.model

    def test_a_shape_that_no_one_asked_to_round_to_4_bits(self, monkeypatch):
        config, gpu = PhiConfig(**vars(CONFIG) | {"channels": 80, "heads": 1, "mlp_hidden": 320}), torch.device("cuda")
        monkeypatch.setattr(cli_engine, "free_bytes", lambda device: int(3e9))
        cli_engine.require_memory(config, gpu, None, None)
        monkeypatch.setattr(cli_engine, "free_bytes", lambda device: weight_bytes(config, torch.bfloat16, None) - 1)
        with pytest.raises(InputError, match=r"; --quantize int8 \(0\.00 GB\) or --device cpu would fit$"):
            cli_engine.require_memory(config, gpu, None, None)
        with pytest.raises(InputError, match="expected a multiple of 32 columns for 4 bits, got 80"):
            cli_engine.require_memory(config, gpu, None, "int4")

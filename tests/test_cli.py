"""The command line: where prompts come from, what it prints, what it refuses, and how it starts and ends."""

import dataclasses
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import xiangxin_fast.generator as generator_module
from tests.command_line import Outcome, run, write_model
from tests.numerics import assert_no_worse_than_torch
from xiangxin_fast.checkpoint import load_pretrained, save_pretrained
from xiangxin_fast.cli.complete import StopMatcher, TextPrinter, write_json_line, write_line
from xiangxin_fast.generator import Generator
from xiangxin_fast.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cli(directory, capsys):
    return lambda *arguments, stdin=b"": run(capsys, directory, *arguments, stdin=stdin)


def json_lines(outcome: Outcome) -> list[dict]:
    return [json.loads(line) for line in outcome.out.splitlines()]


class TestStopMatcher:
    @pytest.mark.parametrize(
        ("stops", "pieces", "shown", "stopped"),
        [
            (["停"], ["走走", "停下"], "走走", True),
            (["abcd"], ["xab", "cd", "y"], "x", True),
            (["abcd"], ["xab", "c", "e"], "xabce", False),
            (["aab"], ["a", "a", "a", "b", "c"], "a", True),
            (["bcd", "ab"], ["abcd"], "", True),
            (["bcd", "abce"], ["a", "b", "c", "d"], "a", True),
            (["ab"], ["xa"], "xa", False),
            ([], ["x", "y"], "xy", False),
        ],
    )
    def test_stops(self, stops, pieces, shown, stopped):
        matcher = StopMatcher(stops)
        assert "".join(map(matcher.push, pieces)) + matcher.finish() == shown
        assert matcher.stopped == stopped

    def test_holds_back_no_more_than_may_begin_a_stop(self):
        matcher = StopMatcher(["\n\n"])
        assert [matcher.push(text) for text in ("一", "\n", "二", "\n")] == ["一", "", "\n二", ""]


class TestText:
    def test_prints_the_completion(self, directory, cli):
        printed = cli("年轻人", "--greedy", "--max-new-tokens", "12").out
        tokenizer, model = Tokenizer.load(directory), load_pretrained(directory, "cpu", torch.float32)
        prompts = [tokenizer.encode("年轻人")]
        (ids,) = Generator(model, valid_ids=len(tokenizer)).generate(prompts, temperature=0, max_new_tokens=12)
        assert printed == tokenizer.decode(ids) + "\n"

    def test_several_prompts_and_samples_each_as_alone(self, cli):
        options = ("--num-samples", "2", "--max-new-tokens", "5")

        def blocks(*prompts: str) -> list[str]:
            return re.split(r"\[\d/\d\]\n", cli(*prompts, *options).out)[1:]

        together = blocks("年轻人", "the")
        assert len(set(together)) == 4
        assert together == blocks("年轻人") + blocks("the")
        assert together[2] == cli("the", "--max-new-tokens", "5").out

    def test_the_seed_decides(self, cli):
        texts = [cli("年轻人", "--seed", seed, "--max-new-tokens", "10").out for seed in ("1", "1", "2")]
        assert texts[0] == texts[1] != texts[2]

    def test_a_stop_string_ends_the_text_before_it(self, cli):
        options = ("年轻人", "--greedy", "--max-new-tokens", "30")
        text = cli(*options).out.rstrip("\n")
        stop = text[4:7]
        stopped = cli(*options, "--stop", "never there", "--stop", stop, "--stats")
        assert stopped.out == text[: text.index(stop)] + "\n"
        assert stopped.err.rstrip().endswith("ended: stop")

    @pytest.mark.parametrize("eos", [None, 7])
    @pytest.mark.parametrize("token", [0, 7])
    def test_ends_at_the_configs_end_of_text_and_at_the_tokenizers(self, directory, tmp_path, capsys, eos, token):
        """The oldest layout's config.json names none."""
        model, tokenizer = load_pretrained(directory, "cpu", torch.float32), Tokenizer.load(directory)
        with torch.no_grad():
            model.head_b[token] = 1000
        model.config = dataclasses.replace(model.config, eos_id=eos)
        save_pretrained(model, tmp_path, tokenizer)
        (line,) = json_lines(run(capsys, tmp_path, "the", "--greedy", "--max-new-tokens", "3", "--json"))
        ends = token in (tokenizer.eos_id, eos)
        assert (line["tokens"], line["finish_reason"]) == (([token], "stop") if ends else ([token] * 3, "length"))

    def test_max_length_counts_the_prompt(self, directory, cli):
        prompt = Tokenizer.load(directory).encode("年轻人")
        stats = cli("年轻人", "--greedy", "--max-length", str(len(prompt) + 3), "--stats").err
        assert re.search(rf"prefill [0-9.]+ tokens/s \({len(prompt)} tokens\)", stats)
        assert "(2 tokens); ended: length" in stats

    def test_a_full_context_is_told(self, cli):
        full = cli("年轻人", "--greedy", "--max-new-tokens", "1000")
        assert "stopped: the model's context of 64 tokens is full" in full.err
        assert full.code == 0

    def test_guesses_change_nothing(self, cli):
        options = ("the quick brown fox the quick brown fox the", "--max-new-tokens", "20")
        for sampling in ("--greedy", "--temperature=0.9"):
            assert cli(*options, sampling, "--lookup", "4").out == cli(*options, sampling).out

    def test_rounded_weights_are_those_that_are_scored_and_completed(self, cli):
        """The last --dtype counts. A completion's log-probabilities are the rounded model's, not the file's."""
        bf16 = ("--dtype", "bfloat16")
        lines = {}
        for kind in ((), ("--quantize", "int8"), ("--quantize", "int4")):
            options = ("年轻人", "--greedy", "--max-new-tokens", "4", "--json", *bf16, *kind)
            (line,) = json_lines(cli(*options))
            lines[kind[-1:]] = line["logprobs"]
        plain, int8, int4 = lines.values()
        errors = [max(abs(a - b) for a, b in zip(plain, found, strict=True)) for found in (int8, int4)]
        assert 0 < errors[0] < errors[1]

    def test_threads(self, cli, monkeypatch):
        asked = []
        monkeypatch.setattr(torch, "set_num_threads", asked.append)
        cli("x", "--max-new-tokens", "1", "--threads", "3")
        assert asked == [3]


class TestPrompts:
    OPTIONS = ("--greedy", "--max-new-tokens", "6")

    @pytest.mark.parametrize("stdin", ["年轻人", "年轻人\n", "年轻人\r\n"])
    def test_standard_input_is_one_prompt_less_its_last_newline(self, cli, stdin):
        expected = cli("年轻人", *self.OPTIONS).out
        assert cli(*self.OPTIONS, stdin=stdin.encode()).out == expected
        assert cli("-", *self.OPTIONS, stdin=stdin.encode()).out == expected

    def test_standard_input_among_others(self, cli):
        assert cli("the", "-", *self.OPTIONS, stdin=b"fox").out == cli("the", "fox", *self.OPTIONS).out

    def test_a_second_newline_stays(self, cli):
        assert cli(*self.OPTIONS, stdin=b"the\n\n").out == cli("the\n", *self.OPTIONS).out

    def test_json_lines_take_the_place_of_arguments(self, tmp_path, directory, cli):
        tokens = Tokenizer.load(directory).encode("年轻人")
        lines = [{"prompt": "the"}, {"tokens": tokens, "id": "b"}, {"prompt": "fox", "max_new_tokens": 2, "other": 1}]
        (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
        done = cli("--input", str(tmp_path / "p.jsonl"), "--json", *self.OPTIONS)
        found = {line["id"]: line for line in json_lines(done)}
        assert done.code == 0
        assert {key: len(line["tokens"]) for key, line in found.items()} == {1: 6, "b": 6, 5: 2}
        assert found[5]["finish_reason"] == "length"
        assert found["b"]["prompt_tokens"] == tokens
        for key, prompt in ((1, "the"), ("b", "年轻人"), (5, "fox")):
            assert cli(prompt, *self.OPTIONS).out.startswith(found[key]["text"].rstrip("\ufffd"))

    def test_lines_that_do_not_fit_are_named_and_the_rest_goes_on(self, cli):
        lines = [
            '{"prompt": "the"}', "{", "[1]", '{"prompt": 3}', '{"tokens": [1, true]}', '{"tokens": [1, 320]}', "{}",
            '{"prompt": "x", "tokens": [1]}', '{"prompt": ""}', '{"prompt": "x", "id": 1.5}', "\xff",
            '{"prompt": "x", "max_new_tokens": 0}', json.dumps({"tokens": [1] * 64}), '{"prompt": "fox"}',
        ]  # fmt: skip
        done = cli("--input", "-", "--json", *self.OPTIONS, stdin="\n".join(lines).encode("latin-1"))
        assert done.code == 1
        assert sorted(line["id"] for line in json_lines(done)) == [1, 14]
        refused = re.findall(r"^refused: standard input:(\d+): expected .*, got .*$|^(.*)$", done.err.strip(), re.M)
        assert [wrong for _, wrong in refused if wrong and not wrong.startswith("refused: standard input:13: ")] == []
        assert sorted(int(number or 13) for number, _ in refused) == list(range(2, 14))

    @pytest.mark.parametrize("mode", [(), ("--json", "--stats"), ("--score",)])
    def test_lines_that_are_all_refused(self, cli, monkeypatch, mode):
        monkeypatch.delattr("xiangxin_fast.cli.engine.load_pretrained")  # nothing to load a model for
        done = cli("--input", "-", *mode, stdin=b'{"tokens": [1, 320]}\n{"tokens": [320, 1]}\n')
        assert (done.code, done.err.count("refused: standard input:"), done.err.count("\n")) == (1, 2, 2)

    def test_nothing_that_fits_is_an_error(self, cli):
        done = cli("--input", "-", stdin=b"{}\n")
        assert done.code == 2
        assert done.err.endswith("error: standard input: expected at least one line that fits, got none\n")


class TestJson:
    def test_the_logprobs_are_the_models_own_whatever_chose_the_tokens(self, directory, cli):
        """They know no temperature, no top-k and no penalty; ids without a token are left out."""
        sampling = ("--temperature", "3", "--top-k", "9", "--repetition-penalty", "1.3", "--max-new-tokens", "12")
        (line,) = json_lines(cli("年轻人", "--json", *sampling))
        tokenizer = Tokenizer.load(directory)
        assert (line["id"], line["prompt"], line["finish_reason"]) == (1, "年轻人", "length")
        assert line["text"] == tokenizer.decode(line["tokens"])
        prompt = tokenizer.encode("年轻人")
        tokens, expected = torch.tensor([prompt + line["tokens"]]), []
        for dtype in (torch.float32, torch.float64):
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
            with torch.no_grad():
                logits = model(tokens[:, :-1]).logits[0, len(prompt) - 1 :, : len(tokenizer)]
            expected.append(logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0])
        assert_no_worse_than_torch(torch.tensor(line["logprobs"]), *expected, what="generate.logprobs")

    def test_a_stop_string_is_in_the_tokens_and_not_in_the_text(self, directory, cli):
        options = ("年轻人", "--greedy", "--max-new-tokens", "30", "--json")
        (whole,) = json_lines(cli(*options))
        stop = whole["text"][4:7]
        (line,) = json_lines(cli(*options, "--stop", stop))
        assert line["text"] == whole["text"][: whole["text"].index(stop)]
        assert line["finish_reason"] == "stop"
        assert line["tokens"] == whole["tokens"][: len(line["tokens"])]
        assert len(line["logprobs"]) == len(line["tokens"])
        assert stop in Tokenizer.load(directory).decode(line["tokens"])

    def test_a_line_comes_when_its_completion_ends(self, cli):
        lines = b'{"prompt": "the", "max_new_tokens": 9}\n{"prompt": "fox", "max_new_tokens": 3}\n'
        assert [line["id"] for line in json_lines(cli("--input", "-", "--json", stdin=lines))] == [2, 1]

    def test_interruption_leaves_whole_lines_and_no_unfinished_one(self, cli, monkeypatch):
        complete = generator_module.Stream.__next__
        steps = iter(range(100))

        def interrupted(self):
            if next(steps) == 8:
                raise KeyboardInterrupt
            return complete(self)

        monkeypatch.setattr(generator_module.Stream, "__next__", interrupted)
        lines = b'{"prompt": "the", "max_new_tokens": 2}\n{"prompt": "fox", "max_new_tokens": 30}\n'
        done = cli("--input", "-", "--json", stdin=lines)
        assert done.code == 130
        assert [line["id"] for line in json_lines(done)] == [1]

    def test_interruption_waits_for_the_line_that_is_being_written(self):
        class Slow(io.StringIO):
            def write(self, text: str) -> int:
                signal.raise_signal(signal.SIGINT)
                return super().write(text)

        out, before = Slow(), signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            write_line(out, "whole")
        assert out.getvalue() == "whole\n"
        assert signal.getsignal(signal.SIGINT) is before

    def test_what_cannot_show_chinese_gets_escapes(self):
        """Not question marks: no character of a JSON line may get lost."""
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
        write_json_line(out, {"a": "中"})
        assert out.buffer.getvalue() == b'{"a": "\\u4e2d"}\n'


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "expected at least one prompt, got none, and nothing on standard input"),
            (("",), "prompt 1: expected at least one token, got none"),
            (("x", "年轻人" * 100), "prompt 2: the model's context is 64 tokens and counts the prompt"),
            (("x", "--max-length", "1"), "prompt 1: --max-length is 1 tokens and counts the prompt"),
            (("x", "--temperature", "-1"), "temperature: expected a number >= 0, got -1.0"),
            (("x", "--top-p", "0"), "top_p: expected"),
            (("x", "--top-p", "1.5"), "top_p: expected"),
            (("x", "--min-p", "2"), "min_p: expected"),
            (("x", "--top-k", "-1"), "top_k: expected"),
            (("x", "--repetition-penalty", "0"), "repetition_penalty: expected"),
            (("x", "--seed", "-1"), "seed: expected"),
            (("x", "--max-new-tokens", "0"), "--max-new-tokens: expected at least 1, got 0"),
            (("x", "--max-length", "0"), "--max-length: expected at least 1, got 0"),
            (("x", "--num-samples", "0"), "--num-samples: expected at least 1, got 0"),
            (("x", "--rows", "0"), "--rows: expected at least 1, got 0"),
            (("x", "--threads", "0"), "--threads: expected at least 1, got 0"),
            (("x", "--rows", "33"), "--rows: expected at most 32, got 33"),
            (("x", "--lookup", "32"), "--lookup: expected at most 31, got 32"),
            (("x", "--quantize", "int8"), "quantize: expected bf16 to compute in, got torch.float32"),
            (("x", "--lookup", "-1"), "--lookup: expected at least 0, got -1"),
            (("x", "--num-samples", "2", "--greedy"), "--num-samples: expected 1 with greedy"),
            (
                ("x", "--greedy", "--temperature", "0.7", "--top-k", "5"),
                "--greedy: expected no --temperature and --top-",
            ),
            (
                ("x", "--greedy", "--min-p", "0.1", "--top-p", "0.9"),
                "--greedy: expected no --min-p and --top-p",
            ),
            (("x", "--stop", ""), "--stop: expected text"),
            (("x", "--device", "tpu9"), "--device: expected"),
            (("x", "--device", "mps"), "--device: expected"),
            (("x", "--device", "cuda:99"), "--device: expected"),
            (("x", "--threads", "100000"), "--threads: expected at most 1024, got 100000"),
            (("x", "--model", "/nonexistent/directory"), "--model: expected a model directory, got /nonexistent/direc"),
            (("x", "--compare", "/nonexistent"), "--compare: expected a model directory, got /nonexistent"),
            (("x", "--bad-flag"), "Unrecognized options: --bad-flag"),
            (("x", "--top-k", "many"), "--top-k"),
            (("x", "--dtype", "int3"), "--dtype"),
            (("x", "--quantize", "int3"), "--quantize"),
            (("x", "--input", "y.jsonl"), "expected prompts or --input, got both: 'x' and y.jsonl"),
            (
                ("--input", "/nonexistent.jsonl"),
                "--input: expected a readable file, got /nonexistent.jsonl: No such file",
            ),
            (("-", "-"), "expected standard input (-) once among the prompts, got it 2 times"),
            (("x", "--stride", "3"), "--stride: expected together with --score, got it without"),
            (("x", "--preset", "demo"), "--preset: expected together with --benchmark, got it without"),
            (
                ("x", "--score", "--interactive"),
                "expected one of --interactive, --score, --compare and --benchmark, got",
            ),
            (("x", "--score", "--top-k", "3"), "--score: expected no --top-k, got it"),
            (("x", "--interactive"), "--interactive: expected no prompts, got it"),
            (("--interactive", "--json"), "--interactive: expected no --json, got it"),
            (("x", "--benchmark"), "--benchmark: expected no prompts, got it"),
            (("--benchmark", "--check-finite"), "--benchmark: expected no --check-finite, got it"),
            (("--benchmark", "--preset", "demo"), "expected --model or --preset, got both"),
            (("--benchmark", "--benchmark-rows", "4", "0"), "--benchmark-rows: expected at least 1, got 0"),
        ],
    )
    def test_what_does_not_fit_is_one_line_and_code_2(self, cli, arguments, message):
        done = cli(*arguments)
        assert done.code == 2
        assert message in done.err
        assert done.err.count("\n") == 1
        assert done.out == ""

    def test_standard_input_that_is_no_text(self, cli):
        done = cli(stdin=b"abc\xff")
        assert (done.code, done.err) == (2, "error: standard input: expected UTF-8, got 0xff at byte 3\n")

    def test_no_model(self, capsys):
        done = run(capsys, None, "x")
        assert (done.code, done.err) == (2, "error: --model: expected a model directory, got none\n")

    def test_weights_that_are_not_numbers(self, directory, tmp_path, capsys):
        """NaN in the bias of an id without a token, where no completion would show it."""
        model = load_pretrained(directory, "cpu", torch.float32)
        with torch.no_grad():
            model.head_b[-1] = 12345.0
        save_pretrained(model, tmp_path, Tokenizer.load(directory))
        file = tmp_path / "model.safetensors"
        value, nan = (struct.pack("<f", number) for number in (12345.0, math.nan))
        file.write_bytes(file.read_bytes().replace(value, nan))
        assert run(capsys, tmp_path, "the", "--max-new-tokens", "2").code == 0
        done = run(capsys, tmp_path, "the", "--max-new-tokens", "2", "--check-finite")
        found = "model.safetensors: lm_head.bias: expected finite weights, got 1 NaN or infinite"
        assert (done.code, done.out, done.err) == (2, "", f"error: {tmp_path / found}\n")

    def test_a_prompt_that_does_not_fit_costs_no_loading(self, cli, monkeypatch):
        monkeypatch.setattr("xiangxin_fast.cli.engine.load_pretrained", None)
        assert "counts the prompt" in cli("年轻人" * 100).err


class TestInterruption:
    def test_keeps_what_is_there(self, cli, monkeypatch):
        complete = generator_module.Stream.__next__
        steps = iter(range(100))

        def interrupted(self):
            if next(steps) == 4:
                raise KeyboardInterrupt
            return complete(self)

        monkeypatch.setattr(generator_module.Stream, "__next__", interrupted)
        done = cli("年轻人", "--greedy", "--stats")
        assert done.code == 130
        assert len(done.out) > 1
        assert done.out.endswith("\n")
        assert "ended: interrupted" in done.err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Sample:
    def __init__(self, finish_reason: str | None = None):
        self.finish_reason = finish_reason


class TestTextPrinter:
    def test_a_terminal_gets_pictures_of_what_it_would_obey(self):
        terminal, pipe = _Terminal(), io.StringIO()
        for out in (terminal, pipe):
            TextPrinter(out, [_Sample("stop")])(0, "a\x1b[2J\x9b\r\x7f\t中\n")
        assert terminal.getvalue() == "a␛[2J\ufffd␍␡\t中\n\n"
        assert pipe.getvalue() == "a\x1b[2J\x9b\r\x7f\t中\n\n"

    def test_later_samples_wait_for_their_turn(self):
        out, samples = io.StringIO(), [_Sample(), _Sample()]
        show = TextPrinter(out, samples)
        show(1, "later")
        show(0, "first")
        assert out.getvalue() == "[1/2]\nfirst"
        samples[0].finish_reason = "stop"
        show(0, "")
        assert out.getvalue() == "[1/2]\nfirst\n[2/2]\nlater"
        samples[1].finish_reason = "stop"
        show(1, "!")
        assert out.getvalue() == "[1/2]\nfirst\n[2/2]\nlater!\n"


ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


class TestAsAProgram:
    def test_help_teaches_without_torch(self):
        code = (
            "import sys, runpy; sys.argv = ['generate', '--help']\n"
            "try: runpy.run_module('xiangxin_fast.generate', run_name='__main__')\n"
            "finally: print('torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=ENVIRONMENT
        )
        assert done.stdout.endswith("False\n")
        flags = (
            "--max-new-tokens --max-length --top-p --stop --stats --input --json --score --compare --benchmark --lookup"
        )
        for flag in (*flags.split(), "exit codes", "examples"):
            assert flag in done.stdout

    def test_a_reader_that_has_gone_is_no_traceback(self, directory):
        command = [
            sys.executable,
            "-m",
            "xiangxin_fast.generate",
            "--model",
            str(directory),
            "--device",
            "cpu",
            "年轻人",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as program:
            program.stdout.close()
            error = program.stderr.read().decode()
            assert program.wait(timeout=120) == 141
        assert "Traceback" not in error
        assert "Exception ignored" not in error

"""The command line: what it prints, what it refuses, and how it starts and ends."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xiangxin_fast.generator as generator_module
from tests.hf import random_model
from xiangxin_fast import generate
from xiangxin_fast.checkpoint import load_pretrained, save_pretrained
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.generator import Generator
from xiangxin_fast.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


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
        matcher = generate.StopMatcher(stops)
        assert "".join(map(matcher.push, pieces)) + matcher.finish() == shown
        assert matcher.stopped == stopped

    def test_holds_back_no_more_than_may_begin_a_stop(self):
        matcher = generate.StopMatcher(["\n\n"])
        assert [matcher.push(text) for text in ("一", "\n", "二", "\n")] == ["一", "", "\n二", ""]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model directory with a tokenizer whose vocabulary is smaller than the model's."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(["年轻人不应该再努力了，年轻人就应该享受生活。" * 3, "the quick brown fox " * 5], 300)
    config = PhiConfig(vocab=320, channels=160, layers=2, heads=2, rotary_dim=32, mlp_hidden=320, context=64)
    save_pretrained(random_model(config), directory, tokenizer)
    return directory


def run_cli(directory: Path, *arguments: str) -> None:
    generate.main(["--model", str(directory), "--dtype", "float32", "--device", "cpu", *arguments])


class TestCommandLine:
    def test_prints_the_completion(self, directory, capsys):
        run_cli(directory, "年轻人", "--greedy", "--max-new-tokens", "12")
        printed = capsys.readouterr().out
        tokenizer = Tokenizer.load(directory)
        model = load_pretrained(directory, "cpu", torch.float32)
        ids = Generator(model, valid_ids=len(tokenizer)).generate(
            [tokenizer.encode("年轻人")], temperature=0, max_new_tokens=12
        )[0]
        assert printed == tokenizer.decode(ids) + "\n"

    def test_several_prompts_and_samples_each_as_alone(self, directory, capsys):
        run_cli(directory, "年轻人", "the", "--num-samples", "2", "--max-new-tokens", "5")
        blocks = re.split(r"\[\d/4\]\n", capsys.readouterr().out)[1:]
        assert len(blocks) == 4
        run_cli(directory, "年轻人", "--max-new-tokens", "5")
        assert blocks[0] == capsys.readouterr().out

    def test_the_seed_decides(self, directory, capsys):
        texts = []
        for seed in ("1", "1", "2"):
            run_cli(directory, "年轻人", "--seed", seed, "--max-new-tokens", "10")
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] != texts[2]

    def test_a_stop_string_ends_the_text_before_it(self, directory, capsys):
        options = ("年轻人", "--greedy", "--max-new-tokens", "30")
        run_cli(directory, *options)
        text = capsys.readouterr().out.rstrip("\n")
        stop = text[4:7]
        run_cli(directory, *options, "--stop", "never there", "--stop", stop, "--stats")
        captured = capsys.readouterr()
        assert captured.out == text[: text.index(stop)] + "\n"
        assert captured.err.rstrip().endswith("ended: stop")

    def test_max_length_counts_the_prompt(self, directory, capsys):
        prompt = Tokenizer.load(directory).encode("年轻人")
        run_cli(directory, "年轻人", "--greedy", "--max-length", str(len(prompt) + 3), "--stats")
        stats = capsys.readouterr().err
        assert (
            f"prefill {float(re.search(r'prefill ([0-9.]+)', stats)[1]):.2f} tokens/s ({len(prompt)} tokens)" in stats
        )
        assert "(2 tokens); ended: length" in stats

    def test_a_full_context_is_told(self, directory, capsys):
        run_cli(directory, "年轻人", "--greedy", "--max-new-tokens", "1000")
        assert "stopped: the model's context of 64 tokens is full" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "expected at least one prompt, got none"),
            (("",), "prompt 0: expected at least one token, got none"),
            (("年轻人" * 100,), "the model's context is 64 tokens and counts the prompt"),
            (("x", "--max-length", "1"), "max_length is 1 tokens and counts the prompt"),
            (("x", "--temperature", "-1"), "temperature: expected a number >= 0, got -1.0"),
            (("x", "--top-p", "0"), "top_p: expected"),
            (("x", "--top-p", "1.5"), "top_p: expected"),
            (("x", "--min-p", "2"), "min_p: expected"),
            (("x", "--top-k", "-1"), "top_k: expected"),
            (("x", "--repetition-penalty", "0"), "repetition_penalty: expected"),
            (("x", "--seed", "-1"), "seed: expected"),
            (("x", "--max-new-tokens", "0"), "max_new_tokens: expected at least 1"),
            (("x", "--num-samples", "0"), "--num-samples: expected at least 1, got 0"),
            (("x", "--num-samples", "2", "--greedy"), "--num-samples: expected 1 with greedy"),
            (("x", "--stop", ""), "--stop: expected text"),
            (("x", "--device", "tpu9"), "--device: expected"),
            (("x", "--device", "cuda:99"), "--device: expected"),
            (("x", "--model", "/nonexistent/directory"), "--model: expected a directory, got /nonexistent/directory"),
            (("x", "--bad-flag"), "Unrecognized options: --bad-flag"),
            (("x", "--top-k", "many"), "--top-k"),
            (("x", "--dtype", "int3"), "--dtype"),
        ],
    )
    def test_what_does_not_fit_is_one_line_and_code_2(self, directory, capsys, arguments, message):
        with pytest.raises(SystemExit) as exit_:
            run_cli(directory, *arguments)
        error = capsys.readouterr().err
        assert exit_.value.code == 2
        assert message in error
        assert error.count("\n") == 1

    def test_interruption_keeps_what_is_there(self, directory, capsys, monkeypatch):
        complete = generator_module.Stream.__next__
        steps = iter(range(100))

        def interrupted(self):
            if next(steps) == 4:
                raise KeyboardInterrupt
            return complete(self)

        monkeypatch.setattr(generator_module.Stream, "__next__", interrupted)
        with pytest.raises(SystemExit) as exit_:
            run_cli(directory, "年轻人", "--greedy", "--stats")
        assert exit_.value.code == 130
        captured = capsys.readouterr()
        assert len(captured.out) > 1
        assert captured.out.endswith("\n")
        assert "ended: interrupted" in captured.err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestPrinter:
    def test_a_terminal_gets_pictures_of_what_it_would_obey(self):
        terminal, pipe = _Terminal(), io.StringIO()
        for out in (terminal, pipe):
            generate._Printer(out, 1).write(0, "a\x1b[2J\x9b\r\x7f\t中\n", True)
        assert terminal.getvalue() == "a␛[2J\ufffd␍␡\t中\n\n"
        assert pipe.getvalue() == "a\x1b[2J\x9b\r\x7f\t中\n\n"

    def test_later_samples_wait_for_their_turn(self):
        out = io.StringIO()
        printer = generate._Printer(out, 2)
        printer.write(1, "later", False)
        printer.write(0, "first", False)
        assert out.getvalue() == "[1/2]\nfirst"
        printer.write(0, "", True)
        assert out.getvalue() == "[1/2]\nfirst\n[2/2]\nlater"
        printer.write(1, "!", True)
        assert out.getvalue() == "[1/2]\nfirst\n[2/2]\nlater!\n"


ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


class TestAsAProgram:
    def test_help_teaches_without_torch(self):
        code = (
            "import sys, runpy; sys.argv = ['generate', '--help']\n"
            "try: runpy.run_module('xiangxin_fast.generate', run_name='__main__')\n"
            "finally: print('torch' in sys.modules)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
        assert run.stdout.endswith("False\n")
        for flag in ("--max-new-tokens", "--max-length", "--top-p", "--repetition-penalty", "--stop", "--stats"):
            assert flag in run.stdout

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
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as run:
            run.stdout.close()
            error = run.stderr.read().decode()
            assert run.wait(timeout=120) == 141
        assert "Traceback" not in error
        assert "Exception ignored" not in error

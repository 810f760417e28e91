"""The modes of the command line: --score, --compare, --interactive."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pty
import re
import select
import signal
import sys
import weakref
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import xiangxin_fast.generator as generator_module
from tests.command_line import CONFIG, STEP, run, write_model
from xiangxin_fast import generate
from xiangxin_fast.cli import compare as cli_compare
from xiangxin_fast.cli import engine as cli_engine
from xiangxin_fast.cli import interactive as cli_interactive
from xiangxin_fast.cli.complete import PICTURES, write_json_line
from xiangxin_fast.cli.interactive import read_entry
from xiangxin_fast.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "first")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A model with other weights, context and tokenizer."""
    config = dataclasses.replace(CONFIG, channels=128, context=48)
    return write_model(tmp_path_factory.mktemp("models") / "second", config, vocab=280)


@pytest.fixture
def cli(directory, capsys):
    return lambda *arguments, stdin=b"": run(capsys, directory, *arguments, stdin=stdin)


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def hf_logprobs(directory):
    """transformers' log-probability, in fp64, of each token after the first given all before it."""
    hf = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)

    def logprobs(tokens: list[int], valid_ids: int) -> list[float]:
        with torch.no_grad():
            logits = hf(torch.tensor([tokens])).logits[0, :-1, :valid_ids]
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()

    return logprobs


class TestScore:
    TEXT = "年轻人就应该，the quick 是"

    def test_the_numbers_are_transformers(self, directory, cli, hf_logprobs):
        tokenizer = Tokenizer.load(directory)
        (line, total) = json_lines(cli("--score", "--json", self.TEXT).out)
        tokens = tokenizer.encode(self.TEXT)
        expected = hf_logprobs(tokens, len(tokenizer))
        assert line["tokens"] == tokens[1:]
        assert line["logprobs"] == pytest.approx(expected, rel=1e-4)
        assert line["logprob"] == pytest.approx(sum(expected), rel=1e-5)
        assert line["perplexity"] == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)
        characters = len(self.TEXT) - len(tokenizer.stream().push(tokens[0]))
        assert line["scored_characters"] == characters
        assert line["bits_per_character"] == pytest.approx(-sum(expected) / math.log(2) / characters, rel=1e-5)
        assert total == {"total": 1} | {key: line[key] for key in total if key != "total"}

    def test_as_text(self, cli):
        (line, _) = json_lines(cli("--score", "--json", self.TEXT).out)
        size = f"({line['scored_tokens']} tokens, {line['scored_characters']} characters)"
        figures = f"perplexity {line['perplexity']:.4f}, {line['bits_per_character']:.4f} bits/character"
        assert cli("--score", self.TEXT).out == f"prompt 1: log-probability {line['logprob']:.4f}, {figures} {size}\n"

    def test_a_prompt_comes_before_and_is_not_scored(self, directory, cli, hf_logprobs):
        tokenizer = Tokenizer.load(directory)
        before, text = tokenizer.encode("年轻人"), tokenizer.encode("the quick")
        lines = json.dumps({"prompt": "年轻人", "text": "the quick", "id": "a"}).encode()
        (line, _) = json_lines(cli("--score", "--json", "--input", "-", stdin=lines).out)
        assert (line["id"], line["tokens"], line["scored_characters"]) == ("a", text, len("the quick"))
        assert line["logprobs"] == pytest.approx(hf_logprobs(before + text, len(tokenizer))[-len(text) :], rel=1e-4)

    def test_of_a_character_that_two_tokens_share_the_second_has_it(self, directory, cli):
        tokenizer = Tokenizer.load(directory)
        assert len(tokenizer.encode("象")) == 3
        (line, _) = json_lines(cli("--score", "--json", "象a").out)
        assert (line["scored_tokens"], line["scored_characters"]) == (3, 2)
        tokens = json.dumps({"tokens": tokenizer.encode("象")[:2]}).encode()
        (line, _) = json_lines(cli("--score", "--json", "--input", "-", stdin=tokens).out)
        assert line["scored_characters"] == 1  # U+FFFD, which the cut-off bytes decode to

    def test_longer_than_the_context(self, directory, cli, hf_logprobs):
        """With a stride of 16, the last token sees the 64 - 16 + 1 or more that its window holds."""
        tokenizer, text = Tokenizer.load(directory), "x年y" * 20
        tokens = tokenizer.encode(text)
        assert len(tokens) > 80
        (line, _) = json_lines(cli("--score", "--json", "--stride", "16", text).out)
        begin = math.ceil((len(tokens) - 1 - 64) / 16) * 16
        assert line["logprobs"][-1] == pytest.approx(hf_logprobs(tokens[begin:], len(tokenizer))[-1], rel=1e-4)
        assert line["scored_tokens"] == len(tokens) - 1

    def test_totals_are_of_all_tokens_and_characters(self, cli):
        *lines, total = json_lines(cli("--score", "--json", self.TEXT, "the fox", stdin=b"").out)
        assert total["total"] == 2
        logprob, tokens = (sum(line[key] for line in lines) for key in ("logprob", "scored_tokens"))
        assert total["perplexity"] == pytest.approx(math.exp(-logprob / tokens), rel=1e-12)
        assert cli("--score", self.TEXT, "the fox").out.splitlines()[2].startswith("all 2: ")

    def test_what_cannot_be_scored(self, cli):
        lines = b'{"text": "the fox"}\n{"text": ""}\n{"tokens": [1]}\n{"prompt": "x"}\n{"tokens": [1, 310]}\n'
        done = cli("--score", "--input", "-", stdin=lines)
        assert done.code == 1
        assert done.out.count("\n") == 1
        assert sorted(map(int, re.findall(r"^refused: standard input:(\d)", done.err, re.M))) == [2, 3, 4, 5]
        alone = cli("--score", "")
        assert (alone.code, alone.err.count("\n")) == (2, 1)
        assert "prompt 1: expected at least two tokens (the first has nothing before it), got 0" in alone.err

    def test_a_stride_that_does_not_fit(self, cli):
        done = cli("--score", "--stride", "65", "the fox")
        assert (done.code, done.err) == (
            2,
            "error: stride: expected a whole number in 1..64 (the model's context), got 65\n",
        )

    def test_damaged_weights_are_an_error_and_not_a_number(self, tmp_path, directory, capsys):
        for file in directory.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        state = load_file(tmp_path / "model.safetensors")
        state["lm_head.bias"][3] = math.nan
        save_file(state, tmp_path / "model.safetensors")
        done = run(capsys, tmp_path, "--score", "the fox")
        assert (done.code, done.out) == (2, "")
        assert "prompt 1: the model gave nan for it" in done.err


class TestCompare:
    OPTIONS = ("--max-new-tokens", "20", "--seed", "5")

    def columns(self, printed: str) -> tuple[str, str]:
        """The text of both columns: what stands between the bars, padding gone."""
        body = printed.split("┩\n")[1].split("├")[0]
        rows = [line.split("│")[1:3] for line in body.splitlines()]
        return tuple("".join(row[i][1:].rstrip() for row in rows) for i in range(2))

    def test_both_completions_stand_side_by_side(self, directory, other, cli, capsys):
        prompt = "年轻人[bold]不"
        printed = cli(prompt, "--compare", str(other), "--greedy", *self.OPTIONS).out
        assert printed.startswith(prompt)
        assert re.search("┃ first +┃ second +┃", printed)
        for column, model in zip(self.columns(printed), (directory, other), strict=True):
            alone = run(capsys, model, prompt, "--greedy", *self.OPTIONS).out
            assert column.replace(" ", "") == "".join(alone.translate(PICTURES).split())

    def test_columns_are_straight_whatever_their_characters(self, cli, other, monkeypatch):
        """A Chinese character takes two cells; no line may be longer or shorter than the others."""
        texts = ("山上有座庙，庙里有个老和尚讲故事。" * 5, "a中" * 30)
        waiting = iter(texts)

        def complete(engine, samples, arguments, show, **options) -> None:
            for sample in samples:
                sample.text = next(waiting)

        monkeypatch.setattr(cli_compare, "complete", complete)
        printed = cli("从前", "--compare", str(other)).out
        assert {cell_len(line) for line in printed.splitlines()[1:]} == {80}
        assert self.columns(printed) == texts

    def test_one_model_at_a_time_is_in_memory(self, cli, other, monkeypatch):
        alive, load = [], cli_engine.load_pretrained

        def counting(*arguments, **options):
            assert all(reference() is None for reference in alive)
            model = load(*arguments, **options)
            alive.append(weakref.ref(model))
            return model

        monkeypatch.setattr(cli_engine, "load_pretrained", counting)
        assert cli("年轻人", "--compare", str(other), *self.OPTIONS).code == 0
        assert len(alive) == 2

    def test_as_json(self, directory, other, cli, capsys):
        lines = b'{"prompt": "the", "id": "a"}\n{"tokens": [1]}\n{"prompt": "fox"}\n'
        done = cli("--input", "-", "--compare", str(other), "--json", *self.OPTIONS, stdin=lines)
        assert done.code == 1
        assert "standard input:2" in done.err
        first, second = json_lines(done.out)
        assert (first["id"], first["prompt"], second["id"]) == ("a", "the", 3)
        assert [c["model"] for c in first["completions"]] == ["first", "second"]
        (alone,) = json_lines(run(capsys, other, "the", "--json", *self.OPTIONS).out)
        assert first["completions"][1] | {"model": 0} == {k: alone[k] for k in alone if k not in ("id", "prompt")} | {
            "model": 0
        }

    def test_directories_of_the_same_name_keep_their_paths(self, directory, cli):
        (found,) = json_lines(cli("the", "--compare", str(directory), "--json", *self.OPTIONS).out)
        assert [c["model"] for c in found["completions"]] == [str(directory)] * 2

    def test_interruption_shows_what_there_is(self, cli, other, monkeypatch):
        complete, steps = generator_module.Stream.__next__, iter(range(100))

        def interrupted(self):
            if next(steps) == 25:  # the sixth token of the second model
                raise KeyboardInterrupt
            return complete(self)

        monkeypatch.setattr(generator_module.Stream, "__next__", interrupted)
        done = cli("the", "--compare", str(other), *self.OPTIONS)
        assert done.code == 130
        assert "ended: length" in done.out
        assert "ended: interrupted" in done.out


class TestInteractive:
    OPTIONS = ("--interactive", "--max-new-tokens", "6")

    @pytest.fixture
    def session(self, directory, capsys, monkeypatch):
        """Runs a session of given entries, exceptions among them; (exit code, out, err)."""

        def entries(*given, options=()):
            waiting = iter(given)

            def read(prompt: str = "") -> str:
                entry = next(waiting, EOFError())
                if isinstance(entry, BaseException):
                    raise entry
                return entry

            monkeypatch.setattr(cli_interactive, "read_entry", read)
            return run(capsys, directory, *self.OPTIONS, *options)

        return entries

    def test_each_entry_is_completed_with_a_seed_of_its_own(self, session, cli):
        done = session("年轻人", "", "年轻人")
        texts = [cli("年轻人", "--max-new-tokens", "6", "--seed", seed).out for seed in ("0", "1")]
        assert done.out == "".join(texts)
        assert texts[0] != texts[1]
        assert done.code == 0

    def test_more_goes_on_from_the_tokens(self, session, cli):
        whole = cli("年轻人", "--max-new-tokens", "12", "--greedy").out
        parts = session("年轻人", "/more", options=("--greedy",)).out
        assert parts.replace("\n", "").replace("\ufffd", "") == whole.replace("\n", "").replace("\ufffd", "")

    def test_set(self, session, cli):
        done = session(
            "/set temperature 0",
            "/set --max-new-tokens 3",
            "年轻人",
            "/set top_k x",
            "/set greedy 1",
            "/set top_p 2",
            "/set max_length 0",
        )
        assert done.out == cli("年轻人", "--max-new-tokens", "3", "--greedy").out
        errors = done.err.splitlines()
        assert errors[0] == "error: /set top_k: expected a number, got 'x'"
        assert errors[1].startswith("error: /set: expected one of temperature, ")
        assert errors[3] == "error: /set max_length: expected at least 1, got 0"
        assert errors[2] == "error: top_p: expected a number above 0 and up to 1, got 2.0"

    def test_commands_are_few_and_text_may_begin_like_one(self, session, cli):
        done = session("/help", "/x", "/more", "//x", options=("--greedy",))
        assert done.err.splitlines()[0] == cli_interactive.HELP
        assert done.err.count("error: expected /help, /set NAME VALUE or, after a completion, /more, got") == 2
        assert done.out == cli("/x", "--max-new-tokens", "6", "--greedy").out

    def test_control_c_at_the_prompt_does_not_leave(self, session, cli):
        done = session(KeyboardInterrupt(), "the", options=("--greedy",))
        assert (done.code, done.out) == (0, cli("the", "--max-new-tokens", "6", "--greedy").out)

    def test_control_c_stops_the_completion_and_not_the_program(self, session, cli, monkeypatch):
        complete, steps = generator_module.Stream.__next__, iter(range(100))

        def interrupted(self):
            if next(steps) == 3:
                raise KeyboardInterrupt
            return complete(self)

        monkeypatch.setattr(generator_module.Stream, "__next__", interrupted)
        done = session("the", "fox", options=("--greedy", "--stats"))
        assert done.code == 0
        assert re.findall("ended: (.*)", done.err) == ["interrupted", "length"]
        assert done.out.endswith("\n" + cli("fox", "--max-new-tokens", "6", "--greedy").out)

    def test_what_does_not_fit_is_told_and_the_session_goes_on(self, session):
        done = session("年轻人" * 100, "the")
        assert "the model's context is 64 tokens" in done.err
        assert (done.code, done.out.count("\n")) == (0, 1)

    def test_lines_in_a_pipe_are_prompts_of_their_own(self, cli):
        done = cli(*self.OPTIONS, "--greedy", stdin=b"the\nfox\n")
        assert done.out == "".join(cli(p, "--max-new-tokens", "6", "--greedy").out for p in ("the", "fox"))

    def test_pasted_lines_are_one_prompt(self, monkeypatch):
        """Without readline's bracketed paste, too: what follows at once was not typed."""
        master, slave = pty.openpty()
        with os.fdopen(slave) as terminal, os.fdopen(master, "wb", buffering=0) as keyboard:
            monkeypatch.setattr(sys, "stdin", terminal)
            keyboard.write("从前\n有座山\n".encode())
            assert read_entry(lambda prompt: os.read(slave, 1 << 10).decode().removesuffix("\n")) == "从前\n有座山"

    def test_on_a_terminal(self, directory):
        """Ctrl-C stops a completion, the next prompt is still read, Ctrl-D leaves."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TERM": "xterm"}
        options = ("--model", str(directory), "--device", "cpu", "--stats")
        command = [sys.executable, "-m", "tests.command_line", *options]
        child, master = pty.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, and inherited so, where tests run in the background
            os.chdir(ROOT)
            os.execve(sys.executable, command, environment)
        with os.fdopen(master, "rb+", buffering=0) as terminal:

            def wait_for(pattern: str) -> str:
                shown = b""
                while not re.search(pattern.encode(), shown):
                    assert select.select([terminal], [], [], 60)[0], shown
                    shown += terminal.read(1 << 12)
                return shown.decode()

            wait_for("Ctrl-D leaves(?s:.)*> ")
            terminal.write("年轻人\r".encode())
            wait_for(STEP)
            terminal.write(b"\x03")
            wait_for("ended: interrupted(?s:.)*> ")
            terminal.write(b"/set max_new_tokens 2\r")
            wait_for("/set max_new_tokens 2(?s:.)*> ")
            terminal.write(b"the\rfox\r")  # a paste
            wait_for("ended: length(?s:.)*> ")
            terminal.write(b"\x04")
            with contextlib.suppress(OSError):  # a terminal whose other end has gone
                while terminal.read(1 << 12):
                    pass
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestATerminalWithoutAPrompt:
    @pytest.mark.parametrize("option", [("--json",), ("--num-samples", "2")])
    def test_is_interactive_and_ignores_no_option(self, directory, capsys, monkeypatch, option):
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(SystemExit, match="2"):
            generate.main(["--model", str(directory), "--device", "cpu", *option])
        expected = f"error: --interactive (a terminal, and no prompt): expected no {option[0]}, got it\n"
        assert capsys.readouterr().err == expected


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_has_characters_alone(encoding):
    """What a prompt had for no character is in the result as the tokenizer took it, and no "?"."""
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace")
    write_json_line(out, {"prompt": "中\ud800b😀", "x": 0.1})
    assert json.loads(out.buffer.getvalue()) == {"prompt": "中\ufffdb😀", "x": 0.1}

"""Completes text with a model directory: `python -m xiangxin_fast.generate --model DIR "prompt"`.

The command line lives here and the engine, `Generator`, in generator.py, which loads on first use: `--help` needs no
torch.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from .errors import InputError, exits_cleanly, one_line_complaints

if TYPE_CHECKING:
    from .generator import Step, Stream
    from .tokenizer import Tokenizer

PROGRAM = "python -m xiangxin_fast.generate"
INTERRUPTED, BROKEN_PIPE = 130, 141  # exit codes as a shell gives them: 128 + signal


def __getattr__(name: str):
    if name != "Generator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .generator import Generator

    return Generator


@dataclass(frozen=True)
class Arguments:
    """Completes each PROMPT with a model and streams the text to standard output.

    Order of the samplers: repetition penalty, temperature, top-k, top-p, min-p (as in transformers). A completion ends
    at the model's end of text, at a --stop string, at --max-new-tokens, at --max-length, or when the model's context is
    full.
    """

    prompts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT [PROMPT ...]")]
    """Text to go on from. Several are completed as a batch; each gets the completion it would get alone."""
    model: Path
    """Model directory: config.json, *.safetensors and the tokenizer's files."""
    max_new_tokens: int | None = None
    """Most tokens of a completion. Default: 256 without --max-length."""
    max_length: int | None = None
    """Most tokens of prompt and completion together."""
    temperature: float = 1.0
    """Divides the logits; 0 is --greedy."""
    top_k: int = 50
    """Sample from the K likeliest tokens only; 0 from all. 50 is what transformers does unasked."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities reach P."""
    min_p: float = 0.0
    """Drop tokens less than P times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: makes tokens that are already there less likely."""
    greedy: bool = False
    """Always take the likeliest token."""
    seed: int = 0
    """The same seed gives the same completions."""
    num_samples: int = 1
    """Completions of each prompt."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End a completion before this text. May be given several times."""
    device: str = "auto"
    """"cuda", "cuda:1", "cpu"; auto: a GPU where there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What to compute in; auto: the fastest on the device."""
    stats: bool = False
    """Print time to first token, prefill and decode speed, and why each completion ended."""


class StopMatcher:
    """Passes text on until one of `stops` appears in it; holds back what may yet become one."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is now certain to come before any stop; after a stop, nothing."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        self.stopped = bool(found)
        certain = min(found) if found else len(text) - self._may_begin_a_stop(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back and did not become a stop."""
        return "" if self.stopped else self._held

    def _may_begin_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop."""
        longest = max(map(len, self._stops), default=0)
        lengths = range(min(len(text), longest - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


class _Sample:
    """The text of one completion as it grows."""

    def __init__(self, tokenizer: "Tokenizer", stops: Sequence[str]):
        self._decoder, self._matcher = tokenizer.stream(), StopMatcher(stops)
        self.tokens = 0
        self.finish_reason: str | None = None

    def push(self, step: "Step") -> str:
        self.tokens += 1
        text = self._matcher.push(self._decoder.push(step.token))
        if self._matcher.stopped:
            self.finish_reason = "stop"
        elif step.finish_reason:
            text += self.finish(step.finish_reason)
        return text

    def finish(self, reason: str) -> str:
        """What is still held back, a character cut short included."""
        self.finish_reason = reason
        return self._matcher.push(self._decoder.finish()) + self._matcher.finish()


# What a terminal would obey instead of show: control characters become their pictures, but for tab and newline.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class _Printer:
    """Writes growing texts one below the other: the first unfinished one live, those after it when it is done."""

    def __init__(self, out, samples: int):
        self._out, self._waiting = out, ["" for _ in range(samples)]
        self._finished = [False] * samples
        self._live = 0
        self._translate = _PICTURES if out.isatty() else {}
        self._write(self._heading())

    def write(self, sample: int, text: str, finished: bool) -> None:
        self._waiting[sample] += text
        self._finished[sample] = finished
        while self._live < len(self._waiting):
            self._write(self._waiting[self._live].translate(self._translate))
            self._waiting[self._live] = ""
            if not self._finished[self._live]:
                return
            self._live += 1
            self._write("\n" + self._heading())

    def _heading(self) -> str:
        several = len(self._waiting) > 1 and self._live < len(self._waiting)
        return f"[{self._live + 1}/{len(self._waiting)}]\n" if several else ""

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()


class _Stats:
    """Where the time went. The step that begins a sample ends that sample's prefill."""

    def __init__(self, prompt_tokens: Sequence[int]):
        self._prompt_tokens = prompt_tokens
        self._started: set[int] = set()
        self._first: float | None = None
        self._seconds = {"prefill": 0.0, "decode": 0.0}
        self._tokens = {"prefill": 0, "decode": 0}
        self._last = time.perf_counter()

    def record(self, step: "Step") -> None:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        phase = "decode" if step.sample in self._started else "prefill"
        self._started.add(step.sample)
        self._seconds[phase] += elapsed
        self._tokens[phase] += 1 if phase == "decode" else self._prompt_tokens[step.sample]
        if self._first is None:
            self._first = elapsed

    def __str__(self) -> str:
        speeds = (
            f"{phase} {count / max(self._seconds[phase], 1e-9):.2f} tokens/s ({count} tokens)"
            for phase, count in self._tokens.items()
        )
        return f"time to first token {self._first or 0:.3f} s, {', '.join(speeds)}"


def _check(arguments: Arguments) -> None:
    """What can be said without loading anything."""
    if not arguments.prompts:
        raise InputError("expected at least one prompt, got none")
    if not arguments.model.is_dir():
        raise InputError(f"--model: expected a directory, got {arguments.model}")
    if arguments.num_samples < 1:
        raise InputError(f"--num-samples: expected at least 1, got {arguments.num_samples}")
    if "" in arguments.stop:
        raise InputError("--stop: expected text, got an empty string")


def _device(name: str):
    import torch

    if name == "auto":
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'--device: expected "auto", "cpu", "cuda" or "cuda:N", got {name!r}') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device: expected a device of this machine, got {name} and {torch.cuda.device_count()} GPUs"
        )
    return device


def _complete(stream: "Stream", samples: list[_Sample], stats: _Stats) -> None:
    printer = _Printer(sys.stdout, len(samples))
    try:
        for step in stream:
            stats.record(step)
            sample = samples[step.sample]
            text = sample.push(step)
            if sample.finish_reason:
                stream.stop(step.sample)
            printer.write(step.sample, text, sample.finish_reason is not None)
    except KeyboardInterrupt:
        for i, sample in enumerate(samples):
            if not sample.finish_reason:
                printer.write(i, sample.finish("interrupted"), True)
        raise


def run(arguments: Arguments) -> None:
    """Completes and prints; the command line without its parsing. InputError on what does not fit."""
    _check(arguments)
    import torch

    from .checkpoint import load_pretrained
    from .generator import Generator
    from .sampling import Sampling
    from .tokenizer import Tokenizer

    sampling = Sampling(
        temperature=0.0 if arguments.greedy else arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    if sampling.temperature == 0 and arguments.num_samples > 1:
        raise InputError("--num-samples: expected 1 with greedy decoding, whose samples are all the same")
    device = _device(arguments.device)
    tokenizer = Tokenizer.load(arguments.model)
    prompts = [tokenizer.encode(prompt) for prompt in arguments.prompts for _ in range(arguments.num_samples)]
    max_new_tokens = arguments.max_new_tokens
    if max_new_tokens is None and arguments.max_length is None:
        max_new_tokens = 256
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model = load_pretrained(arguments.model, device, dtype)
    stream = Generator(model, valid_ids=len(tokenizer)).stream(
        prompts, max_new_tokens=max_new_tokens, max_length=arguments.max_length, **vars(sampling)
    )
    samples = [_Sample(tokenizer, arguments.stop) for _ in prompts]
    stats = _Stats([len(prompt) for prompt in prompts])
    try:
        _complete(stream, samples, stats)
    finally:
        if arguments.stats:
            reasons = ", ".join(str(sample.finish_reason) for sample in samples)
            print(f"{stats}; ended: {reasons}", file=sys.stderr)
        elif any(sample.finish_reason == "context" for sample in samples):
            print(f"stopped: the model's context of {model.config.context} tokens is full", file=sys.stderr)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    with one_line_complaints():
        arguments = tyro.cli(Arguments, args=argv, prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff,))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        run(arguments)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader has gone, `| head` for one; Python would complain once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


if __name__ == "__main__":
    main()

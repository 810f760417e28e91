"""Completing the records of a command line: the stream's tokens as growing texts, printed or as JSON Lines."""

import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xiangxin_fast.errors import InputError
from xiangxin_fast.sampling import Sampling

from .prompts import Record, Refused

if TYPE_CHECKING:
    from xiangxin_fast.generator import Step

    from .arguments import Arguments
    from .engine import Engine

DEFAULT_NEW_TOKENS = 256
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


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


class Sample:
    """One completion as it grows. `limit`: most tokens it may have, None for as many as the stream gives."""

    def __init__(self, engine: "Engine", record: Record, prompt: list[int], limit: int | None, stops: Sequence[str]):
        self.record, self.prompt, self.limit = record, prompt, limit
        self._decoder, self._matcher = engine.tokenizer.stream(), StopMatcher(stops)
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None

    def push(self, step: "Step") -> str:
        """Takes a token; the text that became certain with it."""
        self.tokens.append(step.token)
        self.logprobs.append(step.logprob)
        text = self._matcher.push(self._decoder.push(step.token))
        self.text += text
        reason = step.finish_reason or ("length" if len(self.tokens) == self.limit else None)
        if self._matcher.stopped:
            self.finish_reason = "stop"
        elif reason:
            text += self.finish(reason)
        return text

    def finish(self, reason: str) -> str:
        """Ends it; what was still held back, a character cut short included."""
        self.finish_reason = reason
        text = self._matcher.push(self._decoder.finish()) + self._matcher.finish()
        self.text += text
        return text


Show = Callable[[int, str], None]  # is told about each new piece of a sample's text, the last one included

# What a terminal would obey instead of show: control characters become their pictures, but for tab and newline.
PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class TextPrinter:
    """Writes growing texts one below the other: the first unfinished one live, those after it when it is done."""

    def __init__(self, out: TextIO, samples: Sequence[Sample]):
        self._out, self._samples = out, samples
        self._waiting = ["" for _ in samples]
        self._live = 0
        self._translate = PICTURES if out.isatty() else {}
        self._write(self._heading())

    def __call__(self, sample: int, text: str) -> None:
        self._waiting[sample] += text
        while self._live < len(self._samples):
            self._write(self._waiting[self._live].translate(self._translate))
            self._waiting[self._live] = ""
            if not self._samples[self._live].finish_reason:
                return
            self._live += 1
            self._write("\n" + self._heading())

    def _heading(self) -> str:
        several = len(self._samples) > 1 and self._live < len(self._samples)
        return f"[{self._live + 1}/{len(self._samples)}]\n" if several else ""

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()


class JsonLines:
    """Writes a sample as one JSON object when it is finished; one that was interrupted, not at all."""

    def __init__(self, out: TextIO, samples: Sequence[Sample]):
        self._out, self._samples = out, samples

    def __call__(self, sample: int, text: str) -> None:
        finished = self._samples[sample]
        if finished.finish_reason not in (None, "interrupted"):
            write_json_line(self._out, described(finished.record) | completion(finished))


def described(record: Record) -> dict[str, object]:
    """A record as its result repeats it."""
    given = {"prompt": record.text} if record.tokens is None else {"prompt_tokens": list(record.tokens)}
    return {"id": record.id} | given


def completion(sample: Sample) -> dict[str, object]:
    """A finished sample for JSON."""
    logprobs = [round(value, 8) for value in sample.logprobs]
    return {"text": sample.text, "tokens": sample.tokens, "logprobs": logprobs, "finish_reason": sample.finish_reason}


def write_json_line(out: TextIO, value: dict[str, object]) -> None:
    """Writes `value` as a line of JSON, as `write_line` does; what is no character as the tokenizer has it, U+FFFD."""
    unicode = (out.encoding or "utf-8").lower().startswith("utf")
    line = LONE_SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False))
    write_line(out, line if unicode else json.dumps(json.loads(line)))


def write_line(out: TextIO, line: str) -> None:
    """Writes a line that is whole even where Ctrl-C comes in between."""
    with _held_back_interrupts():
        out.write(f"{line}\n")
        out.flush()


@contextlib.contextmanager
def _held_back_interrupts() -> Iterator[None]:
    pressed = []
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt


class Stats:
    """Where the time went. The step that begins a sample ends that sample's prefill."""

    def __init__(self, samples: Sequence[Sample]):
        self._samples = samples
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
        self._tokens[phase] += 1 if phase == "decode" else len(self._samples[step.sample].prompt)
        if self._first is None:
            self._first = elapsed

    def __str__(self) -> str:
        speeds = (
            f"{phase} {count / max(self._seconds[phase], 1e-9):.2f} tokens/s ({count} tokens)"
            for phase, count in self._tokens.items()
        )
        reasons = ", ".join(str(sample.finish_reason) for sample in self._samples)
        return f"time to first token {self._first or 0:.3f} s, {', '.join(speeds)}; ended: {reasons}"


@contextlib.contextmanager
def token_bar(what: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar of `total` tokens on standard error, where a person watches; gives the function that moves it on."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def sampling_of(arguments: "Arguments") -> Sampling:
    """The sampling options. InputError: one is out of range, or all samples would be the same."""
    options = {name: value for name, value in vars(arguments.sampling).items() if name not in ("greedy", "num_samples")}
    sampling = Sampling(**options | ({"temperature": 0.0} if arguments.sampling.greedy else {}))
    if sampling.temperature == 0 and arguments.sampling.num_samples > 1:
        raise InputError("--num-samples: expected 1 with greedy decoding, whose samples are all the same")
    return sampling


def samples_of(
    engine: "Engine", records: Sequence[Record], arguments: "Arguments", refused: Refused | None
) -> list[Sample]:
    """A sample, or --num-samples, of each record. One that does not fit is refused, or an InputError without that."""
    limits, samples = arguments.limits, []
    unlimited = limits.max_new_tokens is None and limits.max_length is None
    most = DEFAULT_NEW_TOKENS if unlimited else limits.max_new_tokens
    for record in records:
        prompt = record.encode(engine.tokenizer)
        try:
            _check_fits(prompt, record.where, engine, limits.max_length)
        except InputError as error:
            if refused is None:
                raise
            refused.add(error)
            continue
        for _ in range(arguments.sampling.num_samples):
            samples.append(Sample(engine, record, prompt, record.max_new_tokens or most, limits.stop))
    return samples


def _check_fits(prompt: list[int], where: str, engine: "Engine", max_length: int | None) -> None:
    context, vocab = engine.config.context, engine.config.vocab
    if not prompt:
        raise InputError(f"{where}: expected at least one token, got none")
    wrong = next((token for token in prompt if not 0 <= token < vocab), None)
    if wrong is not None:
        raise InputError(f"{where}: expected ids in 0..{vocab - 1}, got {wrong}")
    longest = min(context, max_length or context)
    if len(prompt) >= longest:
        name = "--max-length" if longest < context else "the model's context"
        raise InputError(f"{where}: {name} is {longest} tokens and counts the prompt, which has {len(prompt)}")


def complete(
    engine: "Engine", samples: Sequence[Sample], arguments: "Arguments", show: Show, *, streams: bool, seed: int = 0
) -> None:
    """Completes `samples`, telling `show`. `streams`: it prints the text as it comes. `seed` is added to --seed.

    Ctrl-C ends them as "interrupted", shows what they have, and goes on as KeyboardInterrupt.
    """
    if not samples:  # all refused: nothing to load a model for
        return
    sampling = vars(sampling_of(arguments))
    limits = [sample.limit for sample in samples]
    stats = Stats(samples)
    stream = engine.generator.stream(
        [sample.prompt for sample in samples],
        max_new_tokens=None if None in limits else max(limits),
        max_length=arguments.limits.max_length,
        lookup=arguments.machine.lookup,
        stop_ids=engine.stop_ids,
        **sampling | {"seed": sampling["seed"] + seed},
    )
    longest = min(engine.config.context, arguments.limits.max_length or engine.config.context)
    room = [min(sample.limit or longest, longest - len(sample.prompt)) for sample in samples]
    try:
        with token_bar("Completing", sum(room), not (streams and sys.stdout.isatty())) as advance:
            for step in stream:
                stats.record(step)
                sample = samples[step.sample]
                show(step.sample, sample.push(step))
                advance(1)
                if sample.finish_reason:
                    stream.stop(step.sample)
                    advance(room[step.sample] - len(sample.tokens))
    except KeyboardInterrupt:
        for i, sample in enumerate(samples):
            if not sample.finish_reason:
                show(i, sample.finish("interrupted"))
        raise
    finally:
        if arguments.stats:
            print(stats, file=sys.stderr)
        elif streams and any(sample.finish_reason == "context" for sample in samples):
            print(f"stopped: the model's context of {engine.config.context} tokens is full", file=sys.stderr)


def complete_records(engine: "Engine", records: Sequence[Record], arguments: "Arguments", refused: Refused) -> None:
    """The command line without a mode: completes `records` to standard output."""
    sampling_of(arguments)
    samples = samples_of(engine, records, arguments, None if arguments.input is None else refused)
    show = (JsonLines if arguments.json else TextPrinter)(sys.stdout, samples)
    complete(engine, samples, arguments, show, streams=not arguments.json)

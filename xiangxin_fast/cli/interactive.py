"""Prompts read one by one, each completed as it comes: `--interactive`."""

import contextlib
import dataclasses
import select
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from xiangxin_fast.errors import InputError

from .complete import TextPrinter, complete, samples_of, sampling_of
from .engine import Engine, use_threads
from .prompts import Record

if TYPE_CHECKING:
    from .arguments import Arguments

HELP = "/more goes on; /set NAME VALUE (temperature 0.7); //x completes /x; Ctrl-C stops a completion, Ctrl-D leaves"
SAMPLING = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}
SETTABLE = {"sampling": SAMPLING, "limits": {"max_new_tokens": int, "max_length": int}}
PASTE_S = 0.05  # lines that follow within this time were not typed


def interactive(arguments: "Arguments") -> None:
    """Reads prompts until the end of input and completes each, with --seed, then --seed + 1 and so on."""
    use_threads(arguments.machine)
    sampling_of(arguments)
    engine = Engine(arguments.model, arguments.machine)
    engine.load()
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")
        print(f"{arguments.model.name}: type the beginning of a text. {HELP}", file=sys.stderr)
    session = _Session(engine, arguments)
    while True:
        try:
            session.take(read_entry())
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def read_entry(read: Callable[[str], str] = input) -> str:
    """One prompt: a line, or all the lines that were pasted at once. EOFError at the end of input."""
    terminal = sys.stdin.isatty()
    lines = [read("> " if terminal else "")]
    while terminal and select.select([sys.stdin], [], [], PASTE_S)[0]:
        lines.append(read(""))
    return "\n".join(lines)


class _Session:
    def __init__(self, engine: Engine, arguments: "Arguments"):
        self._engine, self._arguments = engine, arguments
        self._completed = 0
        self._text: list[int] = []  # of the last prompt and its completion

    def take(self, entry: str) -> None:
        """Completes an entry or obeys it. InputError: it does not fit."""
        if entry.startswith("/") and not entry.startswith("//"):
            command, *words = entry.split()
            if command == "/help":
                print(HELP, file=sys.stderr)
            elif command == "/set" and len(words) == 2:
                self._set(*words)
            elif command == "/more" and self._text:
                self._complete(Record("more", "/more", tokens=tuple(self._text)))
            else:
                raise InputError(f"expected /help, /set NAME VALUE or, after a completion, /more, got {entry!r:.100}")
        elif entry:
            self._complete(Record("entry", "prompt", text=entry.removeprefix("/") if entry[:2] == "//" else entry))

    def _complete(self, record: Record) -> None:
        samples = samples_of(self._engine, [record], self._arguments, None)
        show = TextPrinter(sys.stdout, samples)
        try:
            complete(self._engine, samples, self._arguments, show, streams=True, seed=self._completed)
        finally:
            self._completed += 1
            self._text = [*samples[0].prompt, *samples[0].tokens]

    def _set(self, name: str, value: str) -> None:
        """Changes a sampling option or a limit of the completions that follow."""
        name = name.removeprefix("--").replace("-", "_")
        group = next((group for group, kinds in SETTABLE.items() if name in kinds), None)
        if group is None:
            names = ", ".join(name for kinds in SETTABLE.values() for name in kinds)
            raise InputError(f"/set: expected one of {names}, got {name!r:.100}")
        try:
            changes = {name: SETTABLE[group][name](value)}
        except ValueError:
            raise InputError(f"/set {name}: expected a number, got {value!r:.100}") from None
        if group == "limits" and changes[name] < 1:
            raise InputError(f"/set {name}: expected at least 1, got {value}")
        if name == "temperature":
            changes["greedy"] = False
        options = dataclasses.replace(getattr(self._arguments, group), **changes)
        arguments = dataclasses.replace(self._arguments, **{group: options})
        sampling_of(arguments)
        self._arguments = arguments

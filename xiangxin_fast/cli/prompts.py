"""Where prompts come from: arguments, standard input, JSON Lines. A record that does not fit costs itself alone."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from xiangxin_fast.errors import InputError
from xiangxin_fast.strict_files import parse_json

if TYPE_CHECKING:
    from xiangxin_fast.tokenizer import Tokenizer

    from .arguments import Arguments


@dataclass(frozen=True)
class Record:
    """One text to complete or, after a prompt of its own, to score: `text`, or `tokens` given as they are."""

    id: int | str
    where: str  # what errors call it
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    prompt: str | None = None  # comes before a text that is scored
    max_new_tokens: int | None = None

    def encode(self, tokenizer: "Tokenizer") -> list[int]:
        """Its tokens, without those of `prompt`."""
        return tokenizer.encode(self.text) if self.tokens is None else list(self.tokens)


class Refused:
    """Names records that do not fit on standard error, and counts them."""

    def __init__(self):
        self.count = 0

    def add(self, error: InputError) -> None:
        self.count += 1
        print(f"refused: {error}", file=sys.stderr, flush=True)


def read_records(arguments: "Arguments", refused: Refused) -> list[Record]:
    """The records that the command line names. InputError where there is none, or no way to read them."""
    if arguments.input is None:
        texts = arguments.prompts or ("-",)
        if texts.count("-") > 1:
            raise InputError(f"expected standard input (-) once among the prompts, got it {texts.count('-')} times")
        texts = [_standard_input() if text == "-" else text for text in texts]
        if not arguments.prompts and not texts[0]:
            raise InputError("expected at least one prompt, got none, and nothing on standard input")
        return [Record(n, f"prompt {n}", text=text) for n, text in enumerate(texts, 1)]
    name = "standard input" if arguments.input == "-" else arguments.input
    try:
        with sys.stdin.buffer if arguments.input == "-" else Path(name).open("rb") as file:
            records = list(_read_lines(file, name, arguments.score, refused))
    except OSError as error:
        raise InputError(f"--input: expected a readable file, got {name}: {error.strerror}") from None
    if not records:
        raise InputError(f"{name}: expected at least one line that fits, got none")
    return records


def _standard_input() -> str:
    if sys.stdin.isatty():
        print("reading a prompt from the terminal; Ctrl-D on an empty line ends it", file=sys.stderr)
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        wrong = f"0x{data[error.start]:02x} at byte {error.start}"
        raise InputError(f"standard input: expected UTF-8, got {wrong}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _read_lines(file: BinaryIO, name: str, score: bool, refused: Refused) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield _record(parse_json(line, f"{name}:{number}"), number, f"{name}:{number}", score)
            except InputError as error:
                refused.add(error)


def _record(value: dict, number: int, where: str, score: bool) -> Record:
    """The record of one JSON object; keys that mean nothing here are left alone."""

    def expect(holds: bool, expectation: str, got: object) -> None:
        if not holds:
            raise InputError(f"{where}: expected {expectation}, got {got!r:.100}")

    key = "text" if score else "prompt"
    given = [name for name in (key, "tokens") if name in value]
    expect(len(given) == 1, f'either "{key}" or "tokens"', given or sorted(value))
    text, tokens = value.get(key), value.get("tokens")
    if "tokens" in value:
        expect(isinstance(tokens, list) and all(type(t) is int for t in tokens), '"tokens" to be a list of ids', tokens)
    else:
        expect(isinstance(text, str), f'"{key}" to be text', text)
    id_, limit, prompt = value.get("id", number), value.get("max_new_tokens"), value.get("prompt") if score else None
    expect(type(id_) in (int, str), '"id" to be a whole number or text', id_)
    expect(limit is None or (type(limit) is int and limit >= 1), '"max_new_tokens" to be at least 1', limit)
    expect(prompt is None or isinstance(prompt, str), '"prompt" to be text', prompt)
    return Record(id_, where, text, None if tokens is None else tuple(tokens), prompt, limit)

"""Rounds a model directory's weights to 8 or 4 bits: `python -m xiangxin_fast.quantize IN OUT --bits 8`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .errors import exits_cleanly, one_line_complaints

PROGRAM = "python -m xiangxin_fast.quantize"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class Arguments:
    """Rounds the weights of a model directory to 8 or 4 bits and writes a new one.

    `python -m xiangxin_fast.generate --model OUT` then reads a half or a quarter of the bytes for each token; with
    --quantize it does the same rounding each time it loads IN. Embedding, biases and LayerNorms stay in bf16.

    For example:
      quantize DIR DIR-int8
      quantize DIR DIR-int4 --bits 4 --group 32
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """A model directory in Hugging Face's layout."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The directory to write. A model that is there is replaced once the new one is whole."""
    bits: Literal[8, 4] = 8
    """8: one scale for each row of a matrix. 4: one for each group of numbers in a row."""
    group: Annotated[Literal[32, 64, 128] | None, tyro.conf.arg(help_behavior_hint="(default: 64, else 32)")] = None
    """With --bits 4: how many numbers share a scale. Fewer are more exact and take more room."""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    with one_line_complaints():
        arguments = tyro.cli(
            Arguments, args=argv, prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
        )
    from .checkpoint import quantize_directory
    from .tokenizer import Tokenizer

    has_tokenizer = any((arguments.model / name).exists() for name in TOKENIZER_FILES)
    tokenizer = Tokenizer.load(arguments.model) if has_tokenizer else None
    quantize_directory(arguments.model, arguments.out, f"int{arguments.bits}", arguments.group, tokenizer)
    before, after = (
        sum(path.stat().st_size for path in directory.glob("model*.safetensors")) / 1e9
        for directory in (arguments.model, arguments.out)
    )
    print(f"{arguments.out}: {after:.2f} GB of weights, from {before:.2f} GB")
    if tokenizer is None:
        print(f"{arguments.model} has no tokenizer: none was written")


if __name__ == "__main__":
    main()

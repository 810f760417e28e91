"""What two models make of each prompt, side by side: `--compare DIR2`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xiangxin_fast.errors import InputError

from .complete import PICTURES, Sample, complete, completion, described, samples_of, sampling_of, write_json_line
from .prompts import Record, Refused

if TYPE_CHECKING:
    from .arguments import Arguments
    from .engine import Engine


def compare(
    first: "Engine", second: "Engine", records: Sequence[Record], arguments: "Arguments", refused: Refused
) -> None:
    """Completes `records` with one model, then with the other, which takes its place in memory, and prints both."""
    sampling_of(arguments)
    if arguments.input is None:
        columns = [samples_of(engine, records, arguments, None) for engine in (first, second)]
    else:
        records = [record for record in records if _fits_both(record, (first, second), arguments, refused)]
        columns = [samples_of(engine, records, arguments, refused) for engine in (first, second)]
    try:
        for engine, samples in zip((first, second), columns, strict=True):
            complete(engine, samples, arguments, lambda sample, text: None, streams=False)
            engine.release()
    except KeyboardInterrupt:
        _show(columns, _names(first, second), arguments.json)
        raise
    _show(columns, _names(first, second), arguments.json)


def _show(columns: Sequence[Sequence[Sample]], names: Sequence[str], as_json: bool) -> None:
    """Prints what both made of each prompt; what was interrupted, too, but not as JSON."""
    for pair in zip(*columns, strict=True):
        if not as_json:
            _print(pair, names)
        elif all(sample.finish_reason not in (None, "interrupted") for sample in pair):
            found = [{"model": name} | completion(sample) for name, sample in zip(names, pair, strict=True)]
            write_json_line(sys.stdout, described(pair[0].record) | {"completions": found})


def _fits_both(record: Record, engines: Sequence["Engine"], arguments: "Arguments", refused: Refused) -> bool:
    """Whether both models can take `record`; it is refused once if not."""
    try:
        if record.tokens is not None:
            raise InputError(f'{record.where}: expected "prompt", which both models can read, got "tokens"')
        for engine in engines:
            samples_of(engine, [record], arguments, None)
    except InputError as error:
        refused.add(error)
        return False
    return True


def _names(first: "Engine", second: "Engine") -> tuple[str, str]:
    """What the models are called: their directories' names, or the paths where those are the same."""
    paths = first.directory.resolve(), second.directory.resolve()
    same = paths[0].name == paths[1].name
    return tuple(str(path) if same else path.name for path in paths)


def _print(pair: Sequence[Sample], names: Sequence[str]) -> None:
    console = Console(file=sys.stdout, highlight=False)
    table = Table(title=_shown(pair[0].record.text), title_style="bold", title_justify="left", expand=True)
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(_shown(sample.text) for sample in pair))
    table.add_section()
    table.add_row(
        *(Text(f"{len(s.tokens)} tokens, ended: {s.finish_reason or 'not begun'}", style="dim") for s in pair)
    )
    console.print(table)


def _shown(text: str) -> Text:
    """Text as it is, no markup, nothing that a terminal would obey."""
    return Text(text.translate(PICTURES), overflow="fold")

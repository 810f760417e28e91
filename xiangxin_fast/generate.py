"""Completes text with a model directory: `python -m xiangxin_fast.generate --model DIR "prompt"`.

This file is the way in: what the options are is in cli/arguments.py, and what each mode does in a file of its own,
loaded when it is asked for: `--help` needs no torch. `Generator`, the engine, is in generator.py.
"""

import os
import sys
from collections.abc import Sequence

from .cli.arguments import Arguments, parse, refuse_what_has_no_effect
from .errors import exits_cleanly

REFUSED, INTERRUPTED, BROKEN_PIPE = 1, 130, 141  # the latter two as a shell gives them: 128 + signal


def __getattr__(name: str):
    if name != "Generator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .generator import Generator

    return Generator


def run(arguments: Arguments) -> int:
    """The command line without its parsing; the exit code. InputError on what does not fit."""
    nothing_to_do = not arguments.prompts and arguments.input is None
    if arguments.benchmark:
        from .cli.benchmark import benchmark

        benchmark(arguments)
        return 0
    if arguments.interactive or (nothing_to_do and sys.stdin.isatty() and not (arguments.score or arguments.compare)):
        refuse_what_has_no_effect(arguments, "--interactive", " (a terminal, and no prompt)")
        from .cli.interactive import interactive

        interactive(arguments)
        return 0
    from .cli.prompts import Refused, read_records

    refused = Refused()
    records = read_records(arguments, refused)
    from .cli.engine import Engine, use_threads

    use_threads(arguments.machine)
    engine = Engine(arguments.model, arguments.machine)
    if arguments.score:
        from .cli.score import score_records

        score_records(engine, records, arguments, refused)
    elif arguments.compare:
        from .cli.compare import compare

        compare(engine, Engine(arguments.compare, arguments.machine), records, arguments, refused)
    else:
        from .cli.complete import complete_records

        complete_records(engine, records, arguments, refused)
    return REFUSED if refused.count else 0


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        code = run(arguments)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader has gone, `| head` for one; Python would complain once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()

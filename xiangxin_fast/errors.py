"""How the project tells a person that what they gave does not fit."""

import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
    """What the user gave does not fit. The message is one line: what was expected, what came, and where."""


def exits_cleanly(main: Callable) -> Callable:
    """Wraps an entry point: an InputError becomes one line on stderr and exit code 2; anything else is a bug."""

    @functools.wraps(main)
    def run(*arguments, **options):
        try:
            return main(*arguments, **options)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run

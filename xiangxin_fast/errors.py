"""How the project tells a person that what they gave does not fit."""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator


class InputError(ValueError):
    """What the user gave does not fit. The message is one line: what was expected, what came, and where."""

    to_tell: bool | None = None  # of several processes, by this one; None: by the first, since all raise it alike


def exits_cleanly(main: Callable) -> Callable:
    """Wraps an entry point: an InputError becomes one line on stderr and exit code 2; anything else is a bug."""

    @functools.wraps(main)
    def run(*arguments, **options):
        try:
            return main(*arguments, **options)
        except InputError as error:
            if os.environ.get("RANK", "0") == "0" if error.to_tell is None else error.to_tell:
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run


def _one_line(box: str) -> str:
    """tyro's framed report of a bad command line as one line."""
    lines = [line.strip(" │") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts = [part.strip() for part in re.split(r"[─-]{9,}", " ".join(lines))]
    parts = parts if box.startswith("╭") else parts[1:]  # without UTF-8 the title stands above a rule of its own
    # an option that does not exist says more than one that is missing beside it
    message = next((part for part in parts if part.startswith("Unrecognized")), parts[0])
    near = re.search(r"Perhaps you meant:.*?(--[\w-]+)", " ".join(lines), flags=re.DOTALL)
    return message + (f"; perhaps you meant {near[1]}" if near else "")


@contextlib.contextmanager
def one_line_complaints() -> Iterator[None]:
    """Around tyro's parsing: a command line that does not fit raises InputError (with the near match), not a box."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError(f"{_one_line(complaint.getvalue())} (--help lists the options)") from None

"""Entry point of training: `python train/run.py --help`, or under `torchrun --nproc_per_node=8 train/run.py`."""

import os
import shlex
import sys
import traceback
from contextlib import suppress
from pathlib import Path

if not __package__:  # run as a file: Python has put train/ first, whose modules would hide others of the same name
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

from train.config import parse
from train.guards import NotSaved
from xiangxin_fast.errors import exits_cleanly


@exits_cleanly
def main() -> None:
    """Trains as the command line says; exit code 0 also when interrupted and saved, 4 where checkpoints
    cannot be written, 2 where something else does not fit."""
    if "--plan" in sys.argv:
        from train import plan

        plan.main([argument for argument in sys.argv[1:] if argument != "--plan"])
        return
    config = parse(sys.argv[1:])
    try:
        from train.loop import train  # imports torch, which --help and a mistyped option need not wait for

        outcome = train(config)
    except KeyboardInterrupt:
        sys.exit("interrupted before the first step: nothing to save")
    except NotSaved as error:
        if error.to_tell:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(NotSaved.EXIT_CODE)
    if outcome.rank > 0:
        return
    if outcome.finished:
        print(f"Finished at step {outcome.step}: the model is {outcome.model}")
    else:
        command = (
            "the same torchrun command" if "TORCHELASTIC_RUN_ID" in os.environ else shlex.join(["python", *sys.argv])
        )
        print(f"Saved at step {outcome.step}. To go on: {command}")


def command() -> None:
    """`main`, and then the end of the process at once where it failed.

    What torch does at exit waits, with NCCL, for ranks that are gone, and nobody watches any more.
    """
    try:
        main()
        return
    except SystemExit as end:
        if not end.code:
            raise
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # who read it may be gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    command()

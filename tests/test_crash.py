"""Whatever ends a run, it goes on as if nothing had: kill -9 anywhere, a full disk, a rank that dies, signals."""

import dataclasses
import inspect
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent

from tests import rank_jobs, ranks
from tests.training import (
    ONE_THREAD,
    ROOT,
    command_of,
    config_of,
    events_of,
    losses_of,
    make_place,
    weights_of,
)
from train import checkpoint, saver, watchdog
from train.config import TrainConfig
from train.loop import train
from train.metrics import read_metrics
from xiangxin_fast.errors import InputError

RUN = str(ROOT / "train" / "run.py")
LAST = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def settings(place: Path, out: Path, **changes) -> TrainConfig:
    """Twenty steps on two ranks, a checkpoint every other step: a run is saving most of the time."""
    return config_of(place, out, **{"micro_batch": 1, "save_every": 2, "validate_every": 10} | changes)


@pytest.fixture(scope="module")
def uninterrupted(place, tmp_path_factory) -> tuple[TrainConfig, float]:
    """A finished run of two ranks, and the seconds that its steps took."""
    config = settings(place, tmp_path_factory.mktemp("uninterrupted") / "run")
    ranks.run(2, rank_jobs.trained, config)
    return config, read_metrics(config.out)[-2]["seconds"]


def same_end(config: TrainConfig, expected: TrainConfig) -> bool:
    """Whether two runs ended with the same bits: parameters, moments, every loss and gradient norm."""
    return losses_of(config) == losses_of(expected) and weights_of(config, LAST) == weights_of(expected, LAST)


def killed_once(config: TrainConfig, seconds: float) -> bool:
    """Starts two ranks and kills both -9 some seconds after they have begun; whether they were still running."""
    events = config.out / "events.jsonl"
    starts = len(events_of(config, "start")) if events.exists() else 0
    started = ranks.start(2, rank_jobs.trained, config)
    while not events.exists() or len(events_of(config, "start")) == starts:
        assert started.processes[0].is_alive()
        time.sleep(0.01)
    time.sleep(seconds)
    for rank in range(2):
        started.kill(rank)
    return any(end.code == -signal.SIGKILL for end in started.wait())


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(place, uninterrupted, tmp_path, kills):
    """In steps, saves and validations. A run that comes to its end before a kill is held against the other at once."""
    expected, seconds = uninterrupted
    moments, attempt, killed = random.Random(kills), 0, 0
    while killed < kills:
        config = settings(place, tmp_path / f"run{attempt}")
        if killed_once(config, moments.uniform(0, seconds)):
            killed += 1
        else:
            assert same_end(config, expected)
            attempt += 1
    ranks.run(2, rank_jobs.trained, config)
    assert same_end(config, expected)


FAILPOINTS = ("copied", "begun", "shards_written", "shards_synced", "before_manifest", "before_rename", "before_sync",
              "renamed")  # fmt: skip
OF_RANK_0 = ("before_manifest", "before_rename", "before_sync")


def died_at(config: TrainConfig, failpoint: str, rank: int) -> None:
    """Two ranks of which one kills itself when it comes to a failpoint for the third time, and the other is killed."""
    started = ranks.start(
        2, rank_jobs.trained, config, environment={"XIANGXIN_FAILPOINT": f"{failpoint}:{rank}:3:kill"}
    )
    started.processes[rank].join(60)
    started.kill(1 - rank)
    assert started.wait()[rank].code == -signal.SIGKILL


@pytest.mark.parametrize(
    ("failpoint", "rank"),
    [
        *((failpoint, 0) for failpoint in FAILPOINTS),
        *(pytest.param(f, 1, marks=pytest.mark.slow) for f in FAILPOINTS if f not in OF_RANK_0),
    ],
)
def test_killed_inside_a_save_it_ends_with_the_same_bits(place, uninterrupted, tmp_path, failpoint, rank):
    """Incident: KempnerForge#102, checkpoints that count before they are whole."""
    config = settings(place, tmp_path / "run")
    died_at(config, failpoint, rank)
    saved = 6 if failpoint in ("before_sync", "renamed") else 4  # the third save is that of step 6
    newest, _, rejected = checkpoint.newest_valid(config.out / "checkpoints")
    assert (checkpoint.step_of(newest), rejected) in [(saved, []), (6, [])]
    ranks.run(2, rank_jobs.trained, config)
    assert same_end(config, uninterrupted[0])
    assert not list((config.out / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("failpoint", ["shards_written:1", "before_manifest:0", "before_rename:0"])
def test_full_disk_in_a_save_stops_nothing(place, uninterrupted, tmp_path, failpoint):
    """With torch.save, or DCP into one directory, it leaves no checkpoint at all. Here the next save succeeds."""
    config = settings(place, tmp_path / "run")
    ranks.run(2, rank_jobs.trained, config, environment={"XIANGXIN_FAILPOINT": f"{failpoint}:3:enospc"})
    (failed,) = events_of(config, "save_failed")
    assert failed["step"] == 6
    assert "No space left on device" in failed["reason"]
    assert [event["step"] for event in events_of(config, "save")] == [2, 4, *range(8, LAST + 1, 2)]
    assert same_end(config, uninterrupted[0])


def test_no_room_for_one_ranks_part_stops_nothing(place, uninterrupted, tmp_path):
    """The write itself fails, inside torch's writer and on one rank of two: none waits, and nothing is left of it."""
    config = settings(place, tmp_path / "run")
    assert ranks.run(2, rank_jobs.with_no_room_on, config, 1, 6) == [LAST, LAST]
    (failed,) = events_of(config, "save_failed")
    assert (failed["step"], "rank 1: " in failed["reason"]) == (6, True)
    assert "File too large" in failed["reason"]
    assert [event["step"] for event in events_of(config, "save")] == [2, 4, *range(8, LAST + 1, 2)]
    assert not list((config.out / "checkpoints").glob("*.partial"))
    assert same_end(config, uninterrupted[0])


def test_too_little_free_space_is_noticed_before_writing(place, tmp_path, monkeypatch):
    """Incident: open_lm#154, which asks to look early whether there is room."""
    config = settings(place, tmp_path / "run", steps=6)
    usage, asked = shutil.disk_usage, []

    def full_at_first(path):
        asked.append(path)
        return usage(path)._replace(free=100_000) if len(asked) == 1 else usage(path)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", full_at_first)
    assert train(config).finished
    (failed,) = events_of(config, "save_failed")
    assert (failed["step"], "GB free, got 0.0" in failed["reason"]) == (2, True)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(config.out / "checkpoints")] == [6, 4]


def test_checkpoints_that_stay_unwritten_end_the_run_with_a_code_of_its_own(place, tmp_path):
    """Incident: SimpleTuner#2353, a run that trained on for nothing on a full disk. Three failures in a row end it."""
    config = settings(place, tmp_path / "run", steps=100_000, save_every=3)
    ended = ranks.start(2, rank_jobs.on_a_full_disk, config, 2, stderr=tmp_path).wait(60)
    assert all(end.error.startswith("SystemExit: 4") for end in ended), ended
    said = "".join((tmp_path / f"rank{rank}.err").read_text() for rank in range(2))
    assert said.count("error: ") == 1, said
    assert "got 3 failures in a row, the last: [Errno 28] No space left on device; the same command goes on" in said
    assert [event["step"] for event in events_of(config, "save_failed")] == [9, 12, 15]
    newest, _, rejected = checkpoint.newest_valid(config.out / "checkpoints")
    assert (checkpoint.step_of(newest), rejected) == (6, [])


def limited(config: TrainConfig) -> str:
    """A run that may write no file beyond 64 KiB; how it ends."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
    try:
        return str(rank_jobs.trained(config))
    except InputError as error:
        return str(error)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(place, tmp_path):
    """The kernel refuses the writes of a real save; what was there before loads, and then the run can end."""
    config = settings(place, tmp_path / "run", steps=4)
    assert train(config).finished
    longer = dataclasses.replace(config, steps=8)
    (complaint,) = ranks.run(1, limited, longer)
    assert "step 8 not saved: " in complaint
    assert "File too large" in complaint
    newest, _, rejected = checkpoint.newest_valid(config.out / "checkpoints")
    assert (checkpoint.step_of(newest), rejected) == (4, [])
    assert train(longer).finished


def test_what_cannot_be_deleted_stops_nothing(place, tmp_path, monkeypatch):
    """Incidents: prime-rl#1763, torchtitan's purge_thread: a purge that failed, and ended the run."""
    remove = shutil.rmtree

    def refuses(path, ignore_errors=False):
        if Path(path).name == "step-00000002" and not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuses)
    assert train(settings(place, tmp_path / "run", keep=2)).finished


@pytest.mark.parametrize("signalled", [False, True])
def test_killed_rank_ends_the_others_and_is_named(place, tmp_path, signalled):
    """Also when torchrun asks the others to stop while they find out who is gone."""
    config = settings(place, tmp_path / "run", steps=100_000, batch=3, timeout=30.0)
    started = ranks.start(3, rank_jobs.waiting_at, config, 4, 1, "dies", tmp_path, stderr=tmp_path)
    started.processes[1].join(60)
    time.sleep(0.3)
    for rank in (0, 2) if signalled else ():
        started.kill(rank, signal.SIGTERM)
    ended = started.wait(60)
    pid = (tmp_path / "rank1").read_text()
    assert ended[1].code == -signal.SIGKILL
    told = [f"{ended[rank].error} {(tmp_path / f'rank{rank}.err').read_text()}" for rank in (0, 2)]
    assert ended[0].code != 0 != ended[2].code
    assert any("rank 1 (" in words and f"process {pid}) gave no sign" in words for words in told), told
    assert sum(words.count("error: rank 1 (") for words in told) <= 1, "one speaks for all"


def test_stuck_rank_ends_the_others_and_is_named(place, tmp_path):
    """Its process lives, its loop does not: the limit is --timeout."""
    config = settings(place, tmp_path / "run", steps=100_000, timeout=3.0)
    started = ranks.start(2, rank_jobs.waiting_at, config, 4, 1, "hangs", tmp_path, stderr=tmp_path)
    started.processes[0].join(60)
    started.kill(1)
    ended = started.wait()
    assert ended[0].code != 0
    told = f"{ended[0].error} " + "".join((tmp_path / f"rank{rank}.err").read_text() for rank in range(2))
    assert "rank 1 (" in told, told


def test_rank_with_a_corrupt_shard_tells_the_others_why(place, tmp_path):
    """It is named before its tokens are used, and no rank waits for ever."""
    data = shutil.copytree(place / "shards", tmp_path / "shards")
    file = data / "train-00000.bin"
    content = bytearray(file.read_bytes())
    content[4096 + 1000] ^= 1
    file.write_bytes(content)
    config = dataclasses.replace(settings(place, tmp_path / "run"), data=data)
    ended = ranks.start(2, rank_jobs.waiting_at, config, 10**9, 0, "", tmp_path, stderr=tmp_path).wait(60)
    for rank in range(2):
        told = f"{ended[rank].error} {(tmp_path / f'rank{rank}.err').read_text()}"
        assert "train-00000.bin: block 0 (bytes 4,096 onwards) is corrupt" in told, told
    assert not losses_of(config)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--micro-batch", "3", "--batch divisible by --micro-batch 3, got"),
        ("--batch", "3", "--batch divisible by --micro-batch 1 x 2 ranks"),
        ("--context", "64", "expected context 32"),
    ],
)
def test_what_ends_a_run_is_said_once(uninterrupted, tmp_path, option, value, complaint):
    """Whether the ranks find it before they have met, each by itself, or together."""
    arguments = command_of(uninterrupted[0])
    arguments[arguments.index(option) + 1] = value
    ended = ranks.start(2, rank_jobs.commanded, arguments, stderr=tmp_path).wait(60)
    said = "".join((tmp_path / f"rank{rank}.err").read_text() for rank in range(2))
    assert (said.count("error: "), said.count(complaint)) == (1, 1), said
    assert all(end.error.startswith("SystemExit: 2") for end in ended), ended


@pytest.mark.parametrize("on", [[1], [0, 1]])
def test_out_of_memory_is_one_line_that_says_what_to_lower(place, tmp_path, on):
    """On one rank, or on all at the same time; the others would tell it, too, as what became of that rank."""
    config = settings(place, tmp_path / "run", steps=100_000)
    ended = ranks.start(2, rank_jobs.out_of_memory, config, on, stderr=tmp_path).wait(60)
    assert all(end.error.startswith("SystemExit: 2") for end in ended), ended
    said = "".join((tmp_path / f"rank{rank}.err").read_text() for rank in range(2))
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1, said
    assert "expected room for --micro-batch 1 on rank " in errors[0]
    assert "got: CUDA out of memory. Tried to allocate 2.00 GiB: lower --micro-batch" in errors[0]
    assert "Traceback" not in said


def test_a_dead_rank_is_named_before_torchrun_kills_who_could(place):
    """From the first death on it gives the others some time after a signal, then kills them."""
    given = inspect.signature(SimpleElasticAgent).parameters["shutdown_timeout"].default
    assert watchdog.DEAD + 4 * watchdog.INTERVAL < given, "a look, two to let the loop say it, and one late one"


HANGS_AT_EXIT = """
import atexit, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/kernels"]
from train import run
atexit.register(time.sleep, 600)
{before}
run.command()
"""


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [
        ("", 2, "error: "),
        ("run.parse = lambda _: sys.exit('in words')", 1, "in words"),
        ("run.parse = lambda _: 1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_a_run_that_fails_ends_whatever_waits_at_exit(place, tmp_path, before, code, said):
    """NCCL's groups do, for ranks that are gone, when nobody watches any more."""
    program = HANGS_AT_EXIT.format(root=str(ROOT), before=before)
    config = dataclasses.replace(settings(place, tmp_path / "run"), data=tmp_path)
    command = [sys.executable, "-c", program, *command_of(config)]
    done = subprocess.run(command, env=ONE_THREAD, timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_slow_check_of_a_checkpoint_is_no_standstill(place, uninterrupted, tmp_path):
    """33 GB on a disk of 50 MB/s take ten minutes, as long as --timeout: such a run could never go on."""
    out = shutil.copytree(uninterrupted[0].out, tmp_path / "run")
    config = settings(place, out, timeout=2.0)
    assert ranks.run(2, rank_jobs.slow_to_resume, config, 4.0) == [LAST, LAST]


def test_signal_whose_reader_is_gone_still_saves(place, tmp_path):
    """Ctrl-C under `2>&1 | tee log` ends tee first: the remark of the handler goes nowhere, the run goes on."""
    config = settings(place, tmp_path / "run", steps=100_000, save_every=10**6, validate_every=10**6)
    command = [sys.executable, RUN, *command_of(config)]
    process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not (config.out / "metrics.jsonl").exists() or len(losses_of(config)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert checkpoint.newest_valid(config.out / "checkpoints")[0] is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_one_rank_saves_on_all_and_resumes_with_the_same_bits(place, uninterrupted, tmp_path, number):
    """In the middle of a step. Incidents: pocket-tts#277, NeMo-Automodel#3007: ranks that leave at different steps."""
    config = settings(place, tmp_path / "run", save_every=1000)
    started = ranks.start(2, rank_jobs.waiting_at, config, 6, 1, "slow", tmp_path)
    while not (tmp_path / "rank1").exists():
        time.sleep(0.01)
    started.kill(1, number)
    one, two = started.wait()
    assert (one.code, two.code) == (0, 0), (one.error, two.error)
    assert one.value == two.value < LAST
    newest, _, _ = checkpoint.newest_valid(config.out / "checkpoints")
    assert checkpoint.step_of(newest) == one.value
    ranks.run(2, rank_jobs.trained, config)
    assert same_end(config, uninterrupted[0])


def test_signal_in_a_validation_does_not_wait_for_its_end(place, tmp_path, monkeypatch):
    """Incident: goodfire spd#677: flags looked at between steps alone never fired in 6 of 6 preemptions."""
    from train import loop

    summed, calls = loop._summed_loss, []

    def asked(*arguments):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return summed(*arguments)

    monkeypatch.setattr(loop, "_summed_loss", asked)
    outcome = train(settings(place, tmp_path / "run", validation_samples=20, validate_every=LAST))
    assert (outcome.step, outcome.finished, len(calls)) == (0, False, 2)


def test_checkpoint_is_there_before_the_validation_that_fails(place, tmp_path, monkeypatch):
    """Incident: nanochat#446, out of memory in the evaluation after the last step: the model was lost."""
    from train import loop

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(loop, "evaluate", fails)
    config = settings(place, tmp_path / "run", steps=3, save_every=1000, validate_every=3)
    (config.out / "metrics.jsonl").parent.mkdir()
    (config.out / "metrics.jsonl").write_text('{"step": 0, "val_loss": 1.0}\n')
    with pytest.raises(MemoryError):
        train(config)
    threads = [thread for thread in saver.threading.enumerate() if thread.name == "saver"]
    for thread in threads:
        thread.join()
    assert checkpoint.newest_valid(config.out / "checkpoints")[1]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_torchrun_restarts_and_the_run_goes_on(place, uninterrupted, tmp_path, resume):
    """A rank dies in the third save; torchrun starts both again, and the end has the same bits."""
    config = settings(place, tmp_path / "run", resume=resume)
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, RUN, *command_of(config)],
        env=ONE_THREAD | {"XIANGXIN_FAILPOINT": "before_rename:0:8:kill"},
        cwd=tmp_path, timeout=120, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [event["ranks"] for event in events_of(config, "start")] == [2, 2]
    assert events_of(config, "start")[1]["checkpoint"].endswith("step-00000014")
    assert same_end(config, uninterrupted[0])

"""Checkpoints and resuming: exact, whatever stops a run, and never from a damaged file."""

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.training import ONE_THREAD, ROOT, command_of, config_of, events_of, losses_of, make_place, weights_of
from train import checkpoint
from train.config import TrainConfig
from train.loop import train
from train.metrics import read_metrics
from xiangxin_fast.errors import InputError

RUN = [sys.executable, str(ROOT / "train" / "run.py")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory) -> TrainConfig:
    """A finished run of 20 steps; tests read it and change only copies."""
    config = config_of(place, tmp_path_factory.mktemp("straight") / "run")
    assert train(config).finished
    return config


def test_finished_run_is_left_as_it_is(straight):
    before = weights_of(straight, 20), (straight.out / "metrics.jsonl").read_bytes()
    assert train(straight).finished
    assert (weights_of(straight, 20), (straight.out / "metrics.jsonl").read_bytes()) == before


def test_checkpoints_kept_are_the_newest(straight):
    kept = [path.name for path in checkpoint.checkpoints(straight.out / "checkpoints")]
    assert kept == ["step-00000020", "step-00000015", "step-00000010"]


KILLED_AT = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/kernels"]
from train import loop
from train.config import parse
launch = loop._Run._launch
def killed(run):
    if run.position.step + 1 == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    launch(run)
loop._Run._launch = killed
loop.train(parse(sys.argv[1:]))
"""


@pytest.mark.parametrize("killed_in_step", [8, 14])
def test_resumed_after_kill_nine_is_bit_identical(straight, tmp_path, killed_in_step):
    """Fails when a moment, the step of the bias correction or the data position is not restored."""
    config = dataclasses.replace(straight, out=tmp_path / "run")
    code = KILLED_AT.format(root=str(ROOT), step=killed_in_step)
    done = subprocess.run([sys.executable, "-c", code, *command_of(config)], env=ONE_THREAD, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert losses_of(config)[-1][0] == killed_in_step - 2  # a record is written after the next step is launched
    assert train(config).finished
    assert losses_of(config) == losses_of(straight)
    assert weights_of(config, 20) == weights_of(straight, 20)
    validated = [record for record in read_metrics(config.out) if "val_loss" in record]
    assert validated == [record for record in read_metrics(straight.out) if "val_loss" in record]


def copy_of(straight: TrainConfig, out: Path, **changes) -> TrainConfig:
    shutil.copytree(straight.out, out)
    return dataclasses.replace(straight, out=out, **changes)


def flip_bit(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "shard's data": lambda step, older: flip_bit(next(step.glob("*.safetensors")), 0.9),
    "shard's header": lambda step, older: flip_bit(next(step.glob("*.safetensors")), 0.01),
    "state": lambda step, older: flip_bit(step / "state.json", 0.5),
    "manifest": lambda step, older: flip_bit(step / "manifest.json", 0.5),
    "truncated": lambda step, older: (step / "state.json").write_bytes((step / "state.json").read_bytes()[:-1]),
    "empty": lambda step, older: (step / "manifest.json").write_bytes(b""),
    "absent": lambda step, older: next(step.glob("*.safetensors")).unlink(),
    "stray": lambda step, older: (step / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b""),
    "older": lambda step, older: shutil.copy(next(older.glob("*.safetensors")), step),
    "all older": lambda step, older: shutil.copytree(older, step, dirs_exist_ok=True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(straight, tmp_path, damage):
    folder = shutil.copytree(straight.out / "checkpoints", tmp_path / "checkpoints")
    DAMAGES[damage](folder / "step-00000020", folder / "step-00000015")
    path, state, rejected = checkpoint.newest_valid(folder)
    assert (path.name, state["step"]) == ("step-00000015", 15)
    (reason,) = rejected
    assert "step-00000020: " in str(reason)
    assert "\n" not in str(reason)


def test_resume_goes_on_from_the_checkpoint_before_a_damaged_one(straight, tmp_path, capsys):
    config = copy_of(straight, tmp_path / "run")
    flip_bit(config.out / "checkpoints" / "step-00000020" / "state.json", 0.5)
    assert train(config).finished
    assert "step-00000020: state.json: expected sha256" in " ".join(capsys.readouterr().err.split())
    assert weights_of(config, 20) == weights_of(straight, 20)
    assert losses_of(config) == losses_of(straight)
    assert (config.out / "checkpoints" / "step-00000020.aside").exists()


def test_run_whose_checkpoints_are_all_damaged_does_not_start_anew(straight, tmp_path):
    config = copy_of(straight, tmp_path / "run")
    for path in checkpoint.checkpoints(config.out / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(InputError, match="expected a valid checkpoint, got 3 damaged"):
        train(config)


def test_resume_from_an_older_checkpoint_sets_the_newer_aside(straight, tmp_path):
    config = copy_of(straight, tmp_path / "run", steps=16)
    older = config.out / "checkpoints" / "step-00000010"
    assert train(dataclasses.replace(config, resume=str(older))).step == 16
    names = {path.name for path in (config.out / "checkpoints").iterdir()}
    assert names == {"step-00000010", "step-00000015", "step-00000016", "step-00000020.aside"}
    assert losses_of(config)[:10] == losses_of(straight)[:10]
    assert [step for step, *_ in losses_of(config)] == list(range(1, 17))


@pytest.mark.parametrize("change", [{"seed": 2}, {"context": 16}])
def test_resume_with_another_order_of_samples_is_refused(straight, tmp_path, change):
    config = copy_of(straight, tmp_path / "run", **change)
    with pytest.raises(InputError, match=f"expected {next(iter(change))} "):
        train(config)


def test_resume_never_refuses_a_directory_with_checkpoints(straight):
    with pytest.raises(InputError, match="expected none with --resume never, got step-00000020"):
        train(dataclasses.replace(straight, resume="never"))


@pytest.fixture
def launched(monkeypatch) -> dist.Store:
    """The store that a launch of torchrun keeps while it starts its ranks again."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def started_from(config: TrainConfig) -> str | None:
    """The checkpoint from which the last start of a run went on."""
    path = events_of(config, "start")[-1]["checkpoint"]
    return path and Path(path).name


def test_restarted_with_resume_never_it_goes_on(place, tmp_path, launched):
    config = config_of(place, tmp_path / "run", steps=4, save_every=2, resume="never")
    assert train(config).finished
    assert started_from(config) is None
    for steps, newest in ((6, 4), (6, 6), (8, 6)):
        assert train(dataclasses.replace(config, steps=steps)).finished
        assert started_from(config) == f"step-{newest:08d}"


def test_restarted_with_a_checkpoint_to_resume_from_it_takes_the_newest_since(straight, tmp_path, launched):
    """Retention has deleted the one that it began from, and what came after it is not set aside a second time."""
    config = copy_of(straight, tmp_path / "run", steps=20, keep=2)
    config = dataclasses.replace(config, resume=str(config.out / "checkpoints" / "step-00000010"))
    assert train(config).finished
    assert not Path(config.resume).exists()
    assert train(dataclasses.replace(config, steps=21)).finished
    assert started_from(config) == "step-00000020"


def test_restarted_before_its_first_checkpoint_it_begins_as_it_was_asked(straight, tmp_path, launched):
    """From a checkpoint of another run, not from an older one that --out still has."""
    config = copy_of(straight, tmp_path / "run", steps=20)
    theirs = straight.out / "checkpoints" / "step-00000015"
    shutil.rmtree(config.out / "checkpoints" / "step-00000020")
    shutil.rmtree(config.out / "checkpoints" / "step-00000015")
    dist.PrefixStore("launch", launched).set("begun", "15")
    assert train(dataclasses.replace(config, resume=str(theirs))).finished
    assert started_from(config) == "step-00000015"


def test_interrupted_save_leaves_no_checkpoint(straight, tmp_path, monkeypatch):
    """A save that dies at its last write: the directory is not called a checkpoint, the next save clears it away."""
    tensors, write_json = {"model.w": torch.ones(3)}, checkpoint.write_json

    def fails_at_the_manifest(path, value):
        if path.name == checkpoint.MANIFEST:
            raise OSError(28, "No space left on device")
        write_json(path, value)

    checkpoint.save(tmp_path, tensors, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", fails_at_the_manifest)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(tmp_path, tensors, {"step": 2})
    assert checkpoint.newest_valid(tmp_path)[0].name == "step-00000001"
    checkpoint.save(tmp_path, tensors, {"step": 2})
    checkpoint.prune(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}


def test_checkpoint_of_another_shape_is_refused_by_name(straight):
    """Incident: pytorch#126604, tensors of a checkpoint read into others of another shape."""
    newest, state, _ = checkpoint.newest_valid(straight.out / "checkpoints")
    tensors = {name: torch.empty(shape) for name, (_, shape) in state["tensors"].items()}
    tensors["model.embed"] = torch.empty(321, 32)
    with pytest.raises(
        InputError, match=r"expected model.embed \['float32', \[321, 32\]\], got \['float32', \[320, 32\]\]"
    ):
        checkpoint.load(newest, state, tensors)


def test_torn_last_line_of_the_metrics_is_left_out(straight, tmp_path):
    config = copy_of(straight, tmp_path / "run", steps=21)
    with (config.out / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 21, "lo')
    assert train(config).step == 21
    assert [step for step, *_ in losses_of(config)] == list(range(1, 22))


def wait_for_step(config: TrainConfig, process: subprocess.Popen, step: int) -> None:
    while not any(record["step"] >= step for record in read_metrics(config.out)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_says_how_to_go_on_and_exits_with_zero(place, tmp_path, number):
    config = config_of(place, tmp_path / "run", steps=100_000, save_every=100_000)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*RUN, *command_of(config)], env=ONE_THREAD, cwd=tmp_path, **pipes) as process:
        wait_for_step(config, process, 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    (path,) = checkpoint.checkpoints(config.out / "checkpoints")
    state = checkpoint.verify(path)
    assert state["step"] == losses_of(config)[-1][0]
    assert f"Saved at step {state['step']}. To go on: python {RUN[1]} --preset demo" in out


BLOCKED = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/kernels"]
from train import loop
from train.config import parse
def blocked(run):
    print("blocked", flush=True)
    time.sleep(600)
loop._Run._launch = blocked
loop.train(parse(sys.argv[1:]))
"""


def test_second_signal_ends_at_once(place, tmp_path):
    command = [sys.executable, "-c", BLOCKED.format(root=str(ROOT)), *command_of(config_of(place, tmp_path / "run"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ONE_THREAD, **pipes) as process:
        assert process.stdout.readline() == "blocked\n"
        process.send_signal(signal.SIGINT)
        while "once more" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT

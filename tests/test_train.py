"""The trainer: schedule, groups, accumulation, exact resume, signals, metrics and the command line."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training import ONE_THREAD, ROOT, SHAPE, command_of, config_of, make_place
from train import checkpoint, loop
from train.config import TrainConfig, parse
from train.data import IGNORED, TokenDataset
from train.loop import accumulate_gradients, build_model, train
from train.metrics import read_metrics
from train.optim import adamw, learning_rate, parameter_groups
from train.report import loss_curves
from xiangxin_fast import load_pretrained
from xiangxin_fast.errors import InputError
from xiangxin_fast.model import Phi
from xiangxin_fast.tokenizer import Tokenizer

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


def weights_of(config: TrainConfig, step: int) -> dict[str, bytes]:
    """The bytes of a checkpoint's tensors, by name."""
    (file,) = (config.out / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def losses_of(config: TrainConfig) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm of every step, to the last bit."""
    records = [record for record in read_metrics(config.out) if "loss" in record]
    return [(record["step"], record["loss"].hex(), record["grad_norm"].hex()) for record in records]


def random_batch(rows: int, context: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, targets of which row r has only (r + 1)/rows valid, and two documents per row."""
    generator = np.random.default_rng(seed)
    tokens, targets = generator.integers(0, SHAPE.vocab, (2, rows, context))
    for row in range(rows):
        targets[row, context * (row + 1) // rows :] = IGNORED
    segment_ids = (np.arange(context) >= generator.integers(1, context, (rows, 1))).astype(np.int32)
    return tokens, targets, segment_ids


def test_learning_rate_rises_to_the_peak_and_falls_to_the_floor(place, tmp_path):
    config = config_of(place, tmp_path, lr=2.0, lr_floor=0.1, warmup=0.2)
    assert learning_rate(0.1, config) == 1.0
    assert learning_rate(0.2, config) == 2.0
    assert learning_rate(0.6, config) == pytest.approx(1.1)  # half-way down: the mean of peak and floor
    assert learning_rate(1.0, config) == pytest.approx(0.2)
    falling = [learning_rate(i / 100, config) for i in range(20, 101)]
    assert all(a > b for a, b in pairwise(falling))


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_learning_rate_without_or_with_only_a_warm_up(place, tmp_path, warmup):
    config = config_of(place, tmp_path, lr=2.0, warmup=warmup)
    assert learning_rate(0.5, config) == pytest.approx(1.0 if warmup else 1.1)


@pytest.mark.parametrize("tied", [False, True])
def test_only_matrices_decay(tied):
    model = Phi(dataclasses.replace(SHAPE, tied_head=tied))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.3))
    assert decayed == {f"blocks.{n}.{w}" for n in range(2) for w in ("w_in", "w_out")} | (
        {"head_w"} - {"head_w" * tied}
    )
    assert decayed | kept == set(names.values())
    assert [group["weight_decay"] for group in parameter_groups(model, 0.3)] == [0.3, 0.0]


def test_gradients_do_not_depend_on_micro_batches(place, tmp_path):
    """The mean of the micro-batches' means, a well-known fault, would weigh rows with few valid targets too much."""
    batch = random_batch(rows=4, context=16)
    whole = Phi(SHAPE).init_weights(0)
    tokens, targets, segment_ids = map(torch.from_numpy, batch)
    expected = whole.loss(tokens, targets, segment_ids)
    expected.backward()
    for micro_batch in (1, 2, 4):
        model = Phi(SHAPE).init_weights(0)
        loss = accumulate_gradients(model, batch, config_of(place, tmp_path, micro_batch=micro_batch))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for (name, got), (_, want) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            assert (got.grad - want.grad).norm() <= 1e-6 * want.grad.norm(), (micro_batch, name)


def test_a_batch_without_valid_targets_gives_no_gradient(place, tmp_path):
    tokens, targets, segment_ids = random_batch(rows=2, context=8)
    model = Phi(SHAPE).init_weights(0)
    assert (
        accumulate_gradients(model, (tokens, np.full_like(targets, IGNORED), segment_ids), config_of(place, tmp_path))
        == 0
    )
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_documents_are_masked_from_each_other_unless_switched_off(place, tmp_path):
    batch, model = random_batch(rows=2, context=16), Phi(SHAPE).init_weights(0)
    tokens, targets, segment_ids = map(torch.from_numpy, batch)
    masked, plain = config_of(place, tmp_path), config_of(place, tmp_path, segment_ids=False)
    assert accumulate_gradients(model, batch, masked).item() == pytest.approx(
        model.loss(tokens, targets, segment_ids).item()
    )
    assert accumulate_gradients(model, batch, plain).item() == pytest.approx(model.loss(tokens, targets).item())
    assert accumulate_gradients(model, batch, masked) != accumulate_gradients(model, batch, plain)


def test_loss_at_the_start_is_that_of_a_uniform_guess(place, tmp_path):
    config = config_of(place, tmp_path, init_from=None)
    model = build_model(config, Tokenizer.load(config.data), torch.device("cpu"))
    V, C = model.config.vocab, model.config.channels
    tokens = torch.randint(V, (8, 64), generator=torch.Generator().manual_seed(0))
    variance = C * model.config.init_std**2  # of a logit: the final LayerNorm's output has unit variance
    noise = 5 * math.sqrt(variance / tokens.numel())
    loss = model.loss(tokens, tokens.roll(-1, dims=1)).item()
    assert loss == pytest.approx(math.log(V) + variance / 2, abs=noise)


def test_training_lowers_the_validation_loss_and_exports_the_last_weights(straight):
    records = read_metrics(straight.out)
    validation = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    assert list(validation) == [0, 10, 20]
    assert validation[20] < validation[0] - 1
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 21))
    last = [record for record in records if "loss" in record][-1]
    assert last["tokens"] == 20 * 4 * 32
    assert last["lr"] == pytest.approx(straight.lr * straight.lr_floor)

    model = load_pretrained(straight.out / "model", "cpu", torch.float32)
    tensors = {f"model.{name}": torch.empty_like(p) for name, p in model.named_parameters()}
    newest, state, rejected = checkpoint.newest_valid(straight.out / "checkpoints")
    moments = {
        name: torch.empty(shape) for name, (_, shape) in state["tensors"].items() if not name.startswith("model.")
    }
    checkpoint.load(newest, state, tensors | moments)
    assert (state["step"], rejected) == (20, [])
    assert all(torch.equal(tensors[f"model.{name}"], p) for name, p in model.named_parameters())
    assert len(Tokenizer.load(straight.out / "model")) == 300


def test_run_directory_tells_configuration_and_environment(straight):
    written = json.loads((straight.out / "config.json").read_text())
    assert written["training"] == straight.to_json()
    assert written["model"]["channels"] == SHAPE.channels
    environment = json.loads((straight.out / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert any((straight.out / "tb").iterdir())


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
update, calls = loop._update, []
def killed(*arguments):
    calls.append(1)
    if len(calls) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*arguments)
loop._update = killed
loop.train(parse(sys.argv[1:]))
"""


@pytest.mark.parametrize("killed_in_step", [8, 14])
def test_resumed_after_kill_nine_is_bit_identical(straight, tmp_path, killed_in_step):
    """Fails when a moment, the step of the bias correction or the data position is not restored."""
    config = dataclasses.replace(straight, out=tmp_path / "run")
    code = KILLED_AT.format(root=str(ROOT), step=killed_in_step)
    done = subprocess.run([sys.executable, "-c", code, *command_of(config)], env=ONE_THREAD, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert losses_of(config)[-1][0] == killed_in_step - 1
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
    assert names == {
        "step-00000010", "step-00000015", "step-00000016", "step-00000015.aside", "step-00000020.aside"
    }  # fmt: skip
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
    newest, state, _ = checkpoint.newest_valid(straight.out / "checkpoints")
    tensors = {name: torch.empty(shape) for name, (_, shape) in state["tensors"].items()}
    tensors["model.embed"] = torch.empty(321, 32)
    with pytest.raises(
        InputError, match=r"expected model.embed \['float32', \[321, 32\]\], got \['float32', \[320, 32\]\]"
    ):
        checkpoint.load(newest, state, tensors)


def test_loss_that_is_not_finite_changes_no_weight(place, tmp_path):
    config, model = config_of(place, tmp_path), Phi(SHAPE).init_weights(0)
    optimizer = adamw(model, config)
    batch = random_batch(rows=4, context=16)
    with torch.no_grad():
        model.head_b[batch[0][0, 0]] = float("nan")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match="expected a finite loss and gradient, got loss nan"):
        loop._update(model, optimizer, batch, 1e-3, config)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) or name == "head_b"


def test_time_limit_brings_the_learning_rate_down(place, tmp_path, monkeypatch):
    """With a clock that ticks a second at every look: a minute ends long before a million steps, at the floor."""
    ticks = iter(range(1_000_000))
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)), perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", clock)
    config = config_of(place, tmp_path / "run", steps=1_000_000, minutes=1.0, save_every=1000)
    assert train(config).finished
    rates = [record["lr"] for record in read_metrics(config.out) if "lr" in record]
    assert 20 <= len(rates) <= 30  # two looks at the clock per step
    assert max(rates) > 0.9 * config.lr
    assert rates[-1] < 1.1 * config.lr * config.lr_floor
    assert train(config).step == len(rates)  # finished stays finished


def test_init_from_starts_at_its_weights_and_ignores_dropout(place, straight, tmp_path):
    directory = shutil.copytree(place / "hf", tmp_path / "hf")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"resid_pdrop": 0.1}))
    config = config_of(place, tmp_path / "run", init_from=directory, steps=2)
    train(config)
    assert losses_of(config)[0] == losses_of(straight)[0]
    tokens, targets, segment_ids = map(
        torch.from_numpy, TokenDataset(config.data, "train", 32, config.seed).batch(0, 4)
    )
    model = load_pretrained(place / "hf", "cpu", torch.float32)
    first = read_metrics(config.out)[1]["loss"]
    assert first == pytest.approx(model.loss(tokens, targets, segment_ids).item(), rel=1e-6)


def test_init_from_a_model_with_another_tokenizer_is_refused(place, tmp_path):
    directory = shutil.copytree(place / "hf", tmp_path / "hf")
    Tokenizer.train(["天地玄黄宇宙洪荒" * 4], 260).save(directory)
    with pytest.raises(InputError, match="expected the tokenizer of"):
        train(config_of(place, tmp_path / "run", init_from=directory))


def test_context_beyond_the_model_is_refused(place, tmp_path):
    with pytest.raises(InputError, match="expected --context of at most 64, got 65"):
        train(config_of(place, tmp_path / "run", context=65))


def test_more_than_one_process_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="expected one process, got WORLD_SIZE=2"):
        train(config_of(place, tmp_path / "run"))


def test_failing_sink_is_reported_once_and_training_goes_on(place, tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fails)
    config = config_of(place, tmp_path / "run", steps=4)
    assert train(config).finished
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert len(losses_of(config)) == 4


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
def blocked(*arguments):
    print("blocked", flush=True)
    time.sleep(600)
loop._update = blocked
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


def test_torchrun_with_one_process_trains(place, tmp_path):
    config = config_of(place, tmp_path / "run", steps=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", RUN[1]]
    done = subprocess.run(
        [*launch, *command_of(config)], env=ONE_THREAD, cwd=tmp_path, timeout=120, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert len(losses_of(config)) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--data", "d", "--out", "o", "--lrr", "1"], "--lrr, 1; perhaps you meant --lr"),
        (["--data", "d", "--out", "o", "--lr", "much"], "--lr: could not convert string to float: 'much'"),
        (["--data", "d"], "--out"),
        (["--data", "d", "--out", "o", "--batch", "3"], "expected --batch divisible by --micro-batch 2, got 3"),
        (["--data", "d", "--out", "o", "--keep", "1"], "expected --keep of at least 2, got 1"),
        (["--data", "d", "--out", "o", "--warmup", "2"], "expected --warmup in 0..1, got 2.0"),
        (["--data", "d", "--out", "o", "--preset", "dem"], "invalid choice 'dem'"),
    ],
)
def test_bad_options_are_one_line_that_names_them(options, complaint):
    with pytest.raises(InputError) as error:
        parse(["--preset", "demo", *options])
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_data_directory_is_one_line_and_exit_code_two(tmp_path):
    done = subprocess.run(
        [*RUN, "--preset", "demo", "--data", str(tmp_path), "--out", str(tmp_path / "run")],
        env=ONE_THREAD, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "manifest.json" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_teaches_without_importing_torch(tmp_path):
    code = (
        f"import runpy, sys\nsys.argv = ['run.py', '--preset', 'demo', '--help']\n"
        f"try:\n    runpy.run_path({RUN[1]!r}, run_name='__main__')\n"
        f"except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ONE_THREAD, cwd=ROOT / "train", capture_output=True, text=True
    )
    assert done.stdout.endswith("0 False\n"), done.stderr
    assert "--init-from" in done.stdout
    assert "Peak learning rate. (default: 0.0015)" in " ".join(done.stdout.split())


def test_report_draws_the_curves_of_several_runs(straight, tmp_path):
    loss_curves([straight.out, straight.out], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(InputError, match="expected the metrics of a run"):
        loss_curves([tmp_path], tmp_path / "none.png")

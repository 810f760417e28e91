"""The trainer: schedule, groups, accumulation, exact resume, signals, metrics and the command line."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tests.training import ONE_THREAD, ROOT, SHAPE, config_of, events_of, losses_of, make_place, random_batch
from train import checkpoint, loop, metrics, run
from train.config import TrainConfig, parse
from train.data import IGNORED, TokenDataset
from train.loop import accumulate_gradients, build_model, train
from train.metrics import read_metrics
from train.optim import learning_rate, parameter_groups
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


def test_wsd_stays_at_the_peak_and_falls_in_the_last_part(place, tmp_path):
    config = config_of(place, tmp_path, lr=2.0, lr_floor=0.1, warmup=0.1, schedule="wsd", decay=0.2)
    assert learning_rate(0.05, config) == 1.0
    assert {learning_rate(i / 100, config) for i in range(10, 81)} == {2.0}
    assert learning_rate(0.85, config) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # a quarter down: 1 - sqrt(1/4)
    assert learning_rate(1.0, config) == pytest.approx(0.2)


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
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in parameter_groups(parameters, 0.3))
    assert decayed == {f"blocks.{n}.{w}" for n in range(2) for w in ("w_in", "w_out")} | (
        {"head_w"} - {"head_w" * tied}
    )
    assert decayed | kept == set(names.values())
    assert [group["weight_decay"] for group in parameter_groups(parameters, 0.3)] == [0.3, 0.0]


def test_gradients_do_not_depend_on_micro_batches(place, tmp_path):
    """Incidents: transformers#35438, #35527: the mean of the micro-batches' means, or twice it, for that of all."""
    batch = random_batch(SHAPE.vocab, rows=4, context=16)
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
    tokens, targets, segment_ids = random_batch(SHAPE.vocab, rows=2, context=8)
    model = Phi(SHAPE).init_weights(0)
    assert (
        accumulate_gradients(model, (tokens, np.full_like(targets, IGNORED), segment_ids), config_of(place, tmp_path))
        == 0
    )
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_documents_are_masked_from_each_other_unless_switched_off(place, tmp_path):
    batch, model = random_batch(SHAPE.vocab, rows=2, context=16), Phi(SHAPE).init_weights(0)
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


def test_time_limit_brings_the_learning_rate_down(place, tmp_path, monkeypatch):
    """With a clock that ticks a second at every look: a minute ends long before a million steps, at the floor."""
    ticks = iter(range(1_000_000))
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)), perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", clock)
    config = config_of(place, tmp_path / "run", steps=1_000_000, minutes=1.0, save_every=1000)
    assert train(config).finished
    rates = [record["lr"] for record in read_metrics(config.out) if "lr" in record]
    assert 55 <= len(rates) <= 65  # one look at the clock per step
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


def test_failing_sink_is_reported_once_and_training_goes_on(place, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.TensorBoard, "write", fails)
    config = config_of(place, tmp_path / "run", steps=4)
    assert train(config).finished
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert len(losses_of(config)) == 4


def test_lines_that_a_full_disk_refuses_are_written_once_it_is_not(place, tmp_path, monkeypatch, capsys):
    """None is torn and none is lost: which samples an update was left out of is written nowhere else."""
    config = config_of(place, tmp_path / "run", steps=12)
    full, launch = [False], loop._Run._launch

    class Disk(io.FileIO):
        def write(self, data):
            if not full[0]:
                return super().write(data)
            if len(data) > 100:
                return super().write(data[:40])
            raise OSError(28, "No space left on device")

    def watched(run):
        full[0] = 4 <= run.position.step < 9
        launch(run)

    monkeypatch.setattr(loop._Run, "_launch", watched)
    monkeypatch.setattr(metrics, "open", lambda path, mode, buffering: Disk(path, mode), raising=False)
    assert train(config).finished
    assert [step for step, *_ in losses_of(config)] == list(range(1, 13))
    assert [event["step"] for event in events_of(config, "save")] == [5, 10, 12]
    assert 1 <= capsys.readouterr().err.count("metrics: not written: [Errno 28] No space left on device") <= 2


def test_lines_wait_in_bounded_memory_and_survive_a_file_system_that_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MOST_WAITING", 200)
    path = tmp_path / "gone" / "events.jsonl"
    lines = metrics._Lines(path)
    for number in range(100):
        with pytest.raises(OSError):
            lines.add({"event": number})
    path.parent.mkdir()
    lines.add({"event": "back"})
    lines.close()
    written = [line["event"] for line in metrics.read_lines(path)]
    assert written[:-1] == list(range(len(written) - 1))
    assert len(path.read_bytes()) < 300


def test_line_after_one_that_a_crash_tore_is_whole(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": 1}\n{"eve')
    metrics._Lines(tmp_path / "events.jsonl").add({"event": 2})
    assert metrics.read_lines(tmp_path / "events.jsonl") == [{"event": 1}, {"event": 2}]


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


def test_ctrl_c_while_torch_is_imported_is_one_line(monkeypatch, tmp_path):
    class Slow(ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "train.loop", Slow("train.loop"))
    monkeypatch.setattr(sys, "argv", ["run.py", "--preset", "demo", "--data", "d", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="interrupted before the first step"):
        run.main()


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


def test_tensorboard_reads_what_was_written(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(straight.out / "tb"))
    board.Reload()
    losses = {event.step: event.value for event in board.Scalars("loss")}
    assert losses == pytest.approx({step: float.fromhex(loss) for step, loss, _ in losses_of(straight)})
    assert {"val_loss", "lr", "tokens_per_second", "memory_bytes"} <= set(board.Tags()["scalars"])

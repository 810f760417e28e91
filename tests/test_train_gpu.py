"""Training on a GPU, where there is one: what a CPU cannot show of a step, of saves beside it and of going on."""

from pathlib import Path

import pytest
import torch

from tests.training import config_of, events_of, losses_of, make_place, weights_of
from train import loop
from train.config import TrainConfig
from train.loop import train

pytestmark = pytest.mark.gpu
WARM = 2  # steps in which kernels are compiled and libraries take their memory


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def settings(place: Path, out: Path) -> TrainConfig:
    """Twenty steps of the demo's model, sharded over one rank: FSDP, NCCL and bf16 as on eight."""
    return config_of(place, out, init_from=None, context=64, lr=1e-3)


def test_a_run_on_a_gpu_learns_saves_and_goes_on_with_the_same_bits(place, tmp_path, monkeypatch):
    straight, resumed = (settings(place, tmp_path / name) for name in ("straight", "resumed"))
    assert train(straight).finished
    launch = loop._Run._launch

    def asked(run):
        if run.position.step + 2 == 10:
            run.stop_wanted.set()
        launch(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_launch", asked)
        assert train(resumed).step == 10
    assert train(resumed).finished
    assert losses_of(resumed) == losses_of(straight)
    assert weights_of(resumed, 20) == weights_of(straight, 20)
    assert [event["step"] for event in events_of(straight, "save")] == [5, 10, 15, 20]
    losses = [float.fromhex(loss) for _, loss, _ in losses_of(straight)]
    assert losses[-1] < losses[0] - 1
    assert events_of(straight, "skip") == []


def test_the_host_does_not_wait_for_the_gpu_in_a_step(place, tmp_path, monkeypatch):
    """torch raises at each synchronization that it makes between the start and the end of launching a step."""
    launch, watched = loop._Run._launch, []

    def strict(run):
        if run.position.step < WARM:
            return launch(run)
        watched.append(run.position.step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop._Run, "_launch", strict)
    assert train(settings(place, tmp_path / "run")).finished
    assert watched == list(range(WARM, 20))

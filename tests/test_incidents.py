"""What has gone wrong in other people's training, each with the test that it would fail.

Here are those that no other file's tests are about; elsewhere, test docstrings name theirs as "Incident".
"""

import inspect
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training import SHAPE, config_of, events_of, losses_of, make_place
from train import loop, signals
from train.data import IGNORED, TokenDataset
from train.loop import train
from train.mixture import Mixture
from xiangxin_fast.errors import InputError
from xiangxin_fast.model import Phi


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from([1, 2, 4]), st.integers(0, 3)), min_size=1, max_size=8
    ),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_any_sequence_of_crashes_resumes_and_world_sizes_takes_each_sample_once(place, parts, seed):
    """KempnerForge#57, accelerate#2016, #4071, #4233, ms-swift#10050, verl#3457, litgpt#1712 (after a resume in an
    epoch, all later ones had only its rest), composer#3649, llm-foundry#1277. Parts train some steps on some ranks;
    what a crash takes back is trained again. The samples that count are those of a straight run, through three epochs
    and more."""
    data, batch = Mixture(place / "shards", 32, seed), 4
    taken, step = [], 0
    for steps, world, taken_back in parts:
        readers = [
            data.batches((step * batch) + rank * (batch // world), batch // world, (step + steps) * batch, batch)
            for rank in range(world)
        ]
        for rows in itertools.islice(zip(*readers, strict=True), steps):
            taken.append(np.concatenate([tokens for tokens, _, _ in rows]))
        for reader in readers:
            reader.close()
        step = max(0, step + steps - taken_back)
        del taken[step:]
    assert len(taken) == step
    for number in {0, step // 2, step - 1} & set(range(step)):
        assert np.array_equal(taken[number], data.batch(number * batch, batch)[0])


def test_every_epoch_has_every_sample_in_an_order_of_its_own(place):
    """litgpt#1712, torchtitan#2556 (epochs alike after a resume)."""
    data = TokenDataset(place / "shards", "train", 32, seed=1)
    epochs = [[data.sample(epoch * len(data) + i)[0].tobytes() for i in range(len(data))] for epoch in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_document_in_a_pack_does_not_see_the_one_before(place, tmp_path):
    """axolotl#1375, maxtext#4476, nanoVLM#204: change document A, and the loss of document B stays as it is."""
    model = Phi(SHAPE).init_weights(0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SHAPE.vocab, (1, 32), generator=generator)
    targets = torch.randint(SHAPE.vocab, (1, 32), generator=generator)
    targets[:, :16] = IGNORED
    segment_ids = (torch.arange(32) >= 16).int()[None]
    other = tokens.clone()
    other[:, :16] = (tokens[:, :16] + 7) % SHAPE.vocab
    assert model.loss(tokens, targets, segment_ids).item() == model.loss(other, targets, segment_ids).item()
    assert model.loss(tokens, targets).item() != model.loss(other, targets).item()


def test_target_of_an_end_of_text_is_ignored(place):
    """The first token of an unrelated document is nobody's prediction."""
    data = TokenDataset(place / "shards", "train", 32, seed=1)
    tokens, targets, segment_ids = data.batch(0, len(data))
    ends = tokens == data.manifest.eos_id
    assert ends.any()
    assert (targets[ends] == IGNORED).all()
    assert (targets[~ends] != IGNORED).all()
    assert (np.diff(segment_ids, axis=1) == ends[:, :-1]).all()


def test_ctrl_c_under_torchrun_comes_twice_and_is_one_wish(monkeypatch):
    """From the terminal and from torchrun; a second one seconds later is meant."""
    now, ended = [100.0], []
    monkeypatch.setattr(signals, "ONE_WISH_SECONDS", 2.0)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with signals.stop_signals() as stop:
        signals.signal.raise_signal(signals.signal.SIGINT)
        now[0] += 0.1
        signals.signal.raise_signal(signals.signal.SIGINT)
        assert stop.is_set()
        assert ended == []
        now[0] += 3.0
        signals.signal.raise_signal(signals.signal.SIGTERM)
        assert ended == [128 + signals.signal.SIGTERM]


def test_nan_is_not_hidden_in_the_log(place, tmp_path, monkeypatch):
    """transformers' logging_nan_inf_filter shows a mean without it."""
    summed = loop._summed_loss
    monkeypatch.setattr(loop, "_summed_loss", lambda *arguments: summed(*arguments) * float("nan"))
    config = config_of(place, tmp_path / "run", steps=4, validate_every=100, max_skipped=3)
    with pytest.raises(InputError, match="steps 1 to 3"):
        train(config)
    assert [loss for _, loss, _ in losses_of(config)] == ["nan"] * 3
    assert [event["ranks"] for event in events_of(config, "skip")] == [[0]] * 3


def test_records_after_a_resume_do_not_double_back(place, tmp_path):
    """Steps of the metrics ascend, whatever was written after the checkpoint that a run goes on from."""
    config = config_of(place, tmp_path / "run", steps=10)
    train(config)
    with (config.out / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 11, "loss": 1.0}) + '\n{"step": 12, "lo')
    longer = config_of(place, tmp_path / "run", steps=12)
    train(longer)
    assert [step for step, *_ in losses_of(longer)] == list(range(1, 13))


def test_no_collection_of_garbage_comes_in_a_step(place, tmp_path, monkeypatch):
    """nanochat: scans of 500 ms, quite frequently. They are made where a checkpoint or a validation is."""
    import gc

    launch, inside, found = loop._Run._launch, [False], []

    def watched(run):
        inside[0] = True
        launch(run)
        inside[0] = False

    def collecting(phase, info):
        if phase == "start" and inside[0]:
            found.append(info)

    monkeypatch.setattr(loop._Run, "_launch", watched)
    gc.callbacks.append(collecting)
    threshold = gc.get_threshold()
    gc.set_threshold(10)
    try:
        assert train(config_of(place, tmp_path / "run")).finished
    finally:
        gc.callbacks.remove(collecting)
        gc.set_threshold(*threshold)
    assert found == []
    assert gc.isenabled()


def test_host_never_waits_for_the_device_in_a_step():
    """Each of these is a wait; what a step needs of the device the host reads after it has launched the next one."""
    waits = (".item(", ".tolist(", ".cpu(", ".numpy(", "synchronize(", "float(loss", "bool(")
    step = (loop._Run._launch, loop.accumulate_gradients, loop._summed_loss)
    from train.optim import Optimizer

    for function in (*step, Optimizer.squared_norm, Optimizer.step):
        source = inspect.getsource(function)
        assert [wait for wait in waits if wait in source] == [], function.__name__

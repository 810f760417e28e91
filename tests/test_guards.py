"""Guards: losses that are not finite, spikes, replicas that differ."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from tests import rank_jobs, ranks
from tests.training import config_of, events_of, losses_of, make_place, weights_of
from train import checkpoint, data, guards, parallel
from train.guards import ENOUGH, PATIENCE, WINDOW, Guards
from train.loop import train
from train.metrics import read_metrics
from xiangxin_fast.errors import InputError


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize("size", [1, 2])
def test_nan_on_one_rank_changes_nothing_on_any(place, tmp_path, size):
    """Step 3 of 8: parameters and moments keep their bits on all ranks, the event names samples and rank; later steps
    go on, and so does saving (incident: Megatron-LM#3981, a crash when saving after a transient NaN)."""
    config = config_of(place, tmp_path / "run", micro_batch=1, steps=8, save_every=4)
    found = ranks.run(size, rank_jobs.with_nan, config, size - 1, [3])
    for one in found:
        assert one["error"] is None
        assert one["hashes"][2] == one["hashes"][1]
        assert len(set(one["hashes"])) == 7
    (event,) = events_of(config, "skip")
    assert (event["step"], event["samples"], event["ranks"]) == (3, [8, 12], [size - 1])
    records = [record for record in read_metrics(config.out) if "loss" in record]
    assert [record["skipped"] for record in records] == [0, 0, 1, 0, 0, 0, 0, 0]
    _, state, _ = checkpoint.newest_valid(config.out / "checkpoints")
    assert (state["step"], state["updates"], state["finite"]) == (8, 7, True)


def test_nan_in_a_gradient_alone_is_left_out_and_no_rank_accused(place, tmp_path):
    """Summed, it is in every rank's part, whoever it came from: the event says where it was seen."""
    config = config_of(place, tmp_path / "run", micro_batch=1, steps=4)
    assert ranks.run(2, rank_jobs.with_nan_in_a_gradient, config, 1, 2) == [4, 4]
    (event,) = events_of(config, "skip")
    assert (event["step"], event["ranks"], event["parts"]) == (2, [], [0, 1])
    assert math.isfinite(event["loss"])
    assert math.isnan(event["grad_norm"])


def test_resumed_after_a_skipped_update_is_bit_identical(place, tmp_path, monkeypatch):
    """AdamW's bias correction counts updates, not steps."""
    straight, resumed = (config_of(place, tmp_path / name, steps=12, save_every=4) for name in ("one", "two"))
    poison(monkeypatch, {3})
    train(straight)
    poison(monkeypatch, {3})
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert train(resumed).step == 8
    assert train(resumed).finished
    assert losses_of(resumed) == losses_of(straight)
    assert weights_of(resumed, 12) == weights_of(straight, 12)


def stop_at(patch, step: int) -> None:
    """Asks the run to stop so that it does at `step`."""
    from train import loop

    launch = loop._Run._launch

    def asked(run):
        if run.position.step + 2 == step:
            run.stop_wanted.set()
        launch(run)

    patch.setattr(loop._Run, "_launch", asked)


def poison(monkeypatch, steps: set[int]) -> None:
    """Makes the loss of these steps NaN."""
    from train import loop

    launch, summed, now = loop._Run._launch, loop._summed_loss, [0]

    def looked(run):
        now[0] = run.position.step + 1
        launch(run)
        now[0] = 0

    monkeypatch.setattr(loop._Run, "_launch", looked)
    monkeypatch.setattr(
        loop, "_summed_loss", lambda *arguments: summed(*arguments) * (math.nan if now[0] in steps else 1.0)
    )


def test_updates_left_out_in_a_row_end_the_run_with_a_report(place, tmp_path, monkeypatch):
    config = config_of(place, tmp_path / "run", steps=20, save_every=2, max_skipped=3)
    poison(monkeypatch, {4, 6, 7, 8, 9})
    with pytest.raises(InputError, match="expected a finite loss and gradient, got none in steps 6 to 8") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert [event["step"] for event in events_of(config, "skip")] == [4, 6, 7, 8]
    _, state, rejected = checkpoint.newest_valid(config.out / "checkpoints")
    assert (state["finite"], rejected) == (True, [])


def test_clipping_never_spreads_what_is_not_finite(place):
    """Incidents: pytorch#46849, #53843, #55169, habitat#2226: with one NaN, clip_grad_norm_ makes every gradient NaN.
    Here the update is left out."""
    from train.optim import Optimizer
    from xiangxin_fast.config import PhiConfig
    from xiangxin_fast.model import Phi

    shape = PhiConfig(vocab=64, channels=32, layers=1, heads=2, rotary_dim=8, mlp_hidden=64, context=16)
    for value in (math.nan, math.inf, -math.inf):
        model = Phi(shape).init_weights(0)
        optimizer = Optimizer(model, config_of(place, Path("none")))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.ln_b.grad[3] = value
        before = [parameter.clone() for parameter in model.parameters()]
        norm = optimizer.squared_norm().sqrt()
        optimizer.step(1e-2, norm, norm.isfinite())
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert optimizer.updates == 0


def test_batch_without_a_target_is_harmless(place, tmp_path, monkeypatch):
    """Incident: Megatron-LM#3396, a mean over no tokens is NaN."""
    sample = data.TokenDataset.sample

    def empty(self, index):
        tokens, targets, segment_ids = sample(self, index)
        return tokens, targets * 0 + data.IGNORED if 8 <= index < 12 else targets, segment_ids

    monkeypatch.setattr(data.TokenDataset, "sample", empty)
    config = config_of(place, tmp_path / "run", steps=5, validate_every=100)
    assert train(config).finished
    records = [record for record in read_metrics(config.out) if "loss" in record]
    assert (records[2]["loss"], records[2]["grad_norm"], records[2]["skipped"]) == (0.0, 0.0, 0)


class TestDetector:
    def judged(self, losses: list[float]) -> list[int]:
        state = Guards()
        return [step for step, loss in enumerate(losses) if state.judge(step, loss, 1.0, 5)]

    def curve(self, steps: int) -> list[float]:
        """A loss that falls, with noise of 0.02."""
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(steps, generator=generator).mul(0.02).tolist()
        return [3 + 3 * math.exp(-step / 100) + noise[step] for step in range(steps)]

    def test_noise_of_a_falling_curve_is_no_spike(self):
        assert self.judged(self.curve(2000)) == []

    def test_jump_that_stays_is_one_once_it_has_stayed(self):
        losses = self.curve(400)
        losses[300:] = [loss + 1.0 for loss in losses[300:]]
        assert self.judged(losses) == [300 + PATIENCE - 1]

    def test_one_bad_batch_is_none(self):
        losses = self.curve(400)
        losses[300] += 3
        losses[320] += 3
        assert self.judged(losses) == []

    def test_nothing_is_judged_before_there_is_enough_to_judge_by(self):
        assert self.judged([1.0] * (ENOUGH - 1) + [9.0] * PATIENCE) == []  # the first of them is still taken in
        assert self.judged([1.0] * ENOUGH + [9.0] * 5) == [ENOUGH + PATIENCE - 1]

    def test_state_in_a_checkpoint_judges_on_alike(self):
        losses = self.curve(200) + [9.0] * 3
        one, two = Guards(), Guards()
        for step, loss in enumerate(losses[:-2]):
            one.judge(step, loss, 1.0, 5)
            two = Guards(**dataclasses.asdict(two))
            two.judge(step, loss, 1.0, 5)
        assert one == two
        assert len(one.losses) == WINDOW
        assert [one.judge(0, 9.0, 1.0, 5), one.judge(0, 9.0, 1.0, 5)] == [False, True]

    def test_rise_and_patience_are_needed(self):
        """A flat curve deviates by nothing: a rise below 5% is none, however many sigmas it is."""
        assert self.judged([1.0] * 100 + [1.04] * 10) == []
        assert self.judged([1.0] * 100 + [1.06] * 10) == [100 + PATIENCE - 1]


def with_garbage(monkeypatch, first: int, last: int, vocab: int) -> None:
    """Makes the targets of samples first .. last - 1 random: the loss jumps."""
    sample = data.TokenDataset.sample

    def replaced(self, index):
        tokens, targets, segment_ids = sample(self, index)
        if first <= index < last:
            generator = torch.Generator().manual_seed(index)
            targets = torch.randint(vocab, targets.shape, generator=generator).numpy()
        return tokens, targets, segment_ids

    monkeypatch.setattr(data.TokenDataset, "sample", replaced)


def test_spike_is_rewound_and_its_samples_are_left_out(place, tmp_path, monkeypatch):
    """PaLM's remedy. Garbage from step 61 on: back to the checkpoint of step 60, on with the samples after it."""
    config = config_of(place, tmp_path / "run", steps=80, save_every=20, validate_every=80, spike="rewind", lr=3e-3)
    with_garbage(monkeypatch, 240, 256, 300)
    assert train(config).finished
    (spike,), (back,) = events_of(config, "spike"), events_of(config, "rewind")
    assert spike["step"] == 60 + PATIENCE
    assert back["to_step"] == 60
    first, last = back["samples_left_out"]
    assert first == 240
    assert last == 256
    losses = {step: float.fromhex(loss) for step, loss, _ in losses_of(config)}
    assert list(losses) == list(range(1, 81)), "records of the steps that were taken back are gone"
    assert max(list(losses.values())[60:]) < 1.2 * losses[60]
    _, state, _ = checkpoint.newest_valid(config.out / "checkpoints")
    assert state["sample"] == 80 * 4 + last - first


def test_spike_is_only_logged_by_default(place, tmp_path, monkeypatch):
    config = config_of(place, tmp_path / "run", steps=70, save_every=20, validate_every=80, lr=3e-3)
    with_garbage(monkeypatch, 240, 260, 300)
    assert train(config).finished
    assert len(events_of(config, "spike")) == 1
    assert events_of(config, "rewind") == []
    assert events_of(config, "spike")[0]["samples"][0] in range(240, 264)


def test_spikes_without_end_end_the_run(place, tmp_path, monkeypatch):
    monkeypatch.setattr(guards.Guards, "judge", lambda self, step, *_: step == 6)
    config = config_of(place, tmp_path / "run", steps=20, save_every=2, spike="rewind")
    with pytest.raises(InputError, match="expected a loss without spikes, got one at step 6 again after 3 rewinds"):
        train(config)


def test_spike_before_the_first_checkpoint_is_logged_and_the_run_goes_on(place, tmp_path, monkeypatch):
    monkeypatch.setattr(guards.Guards, "judge", lambda self, step, *_: step == 4)
    config = config_of(place, tmp_path / "run", steps=6, save_every=20, spike="rewind")
    assert train(config).finished
    assert events_of(config, "rewind")[0]["failure"] == "no checkpoint from before"


def test_rewound_on_two_ranks(place, tmp_path):
    config = config_of(place, tmp_path / "run", micro_batch=1, steps=12, save_every=4, spike="rewind")
    assert ranks.run(2, rank_jobs.with_spike, config, 7) == [12, 12]
    (back,) = events_of(config, "rewind")
    assert (back["to_step"], back["samples_left_out"]) == (4, [16, 32])
    assert [step for step, *_ in losses_of(config)] == list(range(1, 13))


def test_bit_flipped_in_one_replica_is_found_and_the_ranks_named(place, tmp_path):
    """A silent fault of a GPU or its memory: rank 3 of [replicas 2, shards 2] holds a copy of rank 1's part."""
    config = config_of(place, tmp_path / "run", micro_batch=1, steps=20, replicas=2, check_replicas=4)
    for error in ranks.run(4, rank_jobs.with_flipped_bit, config, 3, 6):
        assert "expected equal parameters in all replicas, got others at step 8 among the ranks [[1, 3]]" in error
    (event,) = events_of(config, "replicas")
    assert event["ranks"] == [[1, 3]]
    assert checkpoint.step_of(checkpoint.newest_valid(config.out / "checkpoints")[0]) == 5


def test_replicas_that_agree_train_on(place, tmp_path):
    config = config_of(place, tmp_path / "run", micro_batch=1, steps=6, replicas=2, check_replicas=2)
    assert ranks.run(2, rank_jobs.with_flipped_bit, config, 9, 1) == [None, None]
    assert len(weights_of(config, 6)) > 0


def test_fingerprint_sees_every_bit_and_every_exchange():
    """On one process: of two lists that differ in a bit, or in order, the sums differ."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(64, generator=generator), torch.randn(7, 3, generator=generator)]
    expected = parallel.fingerprint(parts)
    for part in parts:
        words = part.view(torch.int32).flatten()
        for place in range(len(words)):
            for bit in range(32):
                words[place] ^= -(2**31) if bit == 31 else 1 << bit
                assert parallel.fingerprint(parts) != expected
                words[place] ^= -(2**31) if bit == 31 else 1 << bit
    assert parallel.fingerprint(parts) == expected
    assert parallel.fingerprint(parts[::-1]) != expected
    assert parallel.fingerprint([parts[0].flip(0), parts[1]]) != expected

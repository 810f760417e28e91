"""Training on several ranks: same samples, same loss and same gradients as on one, whatever they are spread over."""

import dataclasses
import json
import math
import shutil
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests import rank_jobs, ranks
from tests.training import (
    ONE_THREAD,
    ROOT,
    SHAPE,
    command_of,
    config_of,
    events_of,
    losses_of,
    make_place,
    random_batch,
)
from train import loop, parallel, saver
from train.config import TrainConfig
from train.loop import train
from train.metrics import read_metrics
from xiangxin_fast import load_pretrained
from xiangxin_fast.errors import InputError
from xiangxin_fast.model import Phi

ODD = dataclasses.replace(SHAPE, vocab=333)  # no number of ranks divides it


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory) -> TrainConfig:
    """A finished run of 20 steps of one process."""
    config = config_of(place, tmp_path_factory.mktemp("straight") / "run", micro_batch=1)
    assert train(config).finished
    return config


@pytest.fixture(scope="module")
def one_big_batch() -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of 16 sequences with uneven valid targets, in one forward and backward."""
    model = Phi(ODD).init_weights(0)
    loss = model.loss(*map(torch.from_numpy, random_batch(ODD.vocab, rows=16, context=16)))
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("size", "replicas"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_loss_and_gradients_are_those_of_one_big_batch(place, tmp_path, one_big_batch, size, replicas):
    """Incidents: transformers#34191, #34242, torchtitan#1803, #1842, #2206, prime-rl#1957, speculators#942 (means of
    the ranks' means), pytorch#162338 (gradients scaled by the number of ranks).

    Accumulation 1, 2 and 4 on 1, 2 and 4 ranks, sharded and replicated; a vocabulary that no number of ranks divides.
    """
    config = config_of(place, tmp_path / "run", batch=16, context=16)
    micro_batches = [16 // size // accumulation for accumulation in (1, 2, 4)]
    loss, expected = one_big_batch
    norm = math.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in expected.values()))
    for found in ranks.run(size, rank_jobs.gradients, config, ODD, micro_batches, replicas):
        for micro_batch, one in zip(micro_batches, found, strict=True):
            assert one["loss"] == pytest.approx(loss, rel=1e-6)
            assert one["norm"] == pytest.approx(norm, rel=1e-6)
            for name, gradient in one["gradients"].items():
                error = np.linalg.norm(gradient - expected[name]) / np.linalg.norm(expected[name])
                assert error <= 1e-6, (size, replicas, micro_batch, name)


def test_alone_on_a_gpu_gradients_are_not_copied_to_divide_them_by_one(place, tmp_path, one_big_batch):
    """A mesh of one rank, as a single GPU has it: the same gradients, and as many divisions as without."""
    config = config_of(place, tmp_path, batch=16, micro_batch=4)

    def divisions(model, ranks):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loop.accumulate_gradients(model, random_batch(ODD.vocab, rows=16, context=16), config, ranks)
        return sum(event.name == "aten::div" for event in profile.events())

    expected = divisions(Phi(ODD).init_weights(0), parallel.ALONE)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        alone = parallel.Ranks(mesh=init_device_mesh("cpu", (1,)))
        model = parallel.shard(Phi(ODD).init_weights(0), alone)
        assert divisions(model, alone) == expected
    finally:
        dist.destroy_process_group()
    for name, parameter in model.named_parameters():
        gradient, whole = parallel.local(parameter.grad).numpy(), one_big_batch[1][name]
        assert np.linalg.norm(gradient - whole) <= 1e-6 * np.linalg.norm(whole), name


def test_gradients_cross_the_ranks_once_a_step(place, tmp_path):
    """Four micro-batches, one sum for each block and one for the rest."""
    config = config_of(place, tmp_path / "run", micro_batch=1)
    assert ranks.run(2, rank_jobs.gradient_sums, config) == [SHAPE.layers + 1] * 2


def test_bf16_is_for_computing_alone(place, tmp_path):
    """Masters and gradients are fp32. Incident: rotary tables cast to bf16 (transformers#29285), positions collide."""
    found = ranks.run(2, rank_jobs.in_bf16, config_of(place, tmp_path / "run"))[0]
    assert found == {
        "x": {"torch.bfloat16"}, "weight": {"torch.bfloat16"}, "cos": {"torch.float32"},
        "master": {"torch.float32"}, "gradient": {"torch.float32"},
    }  # fmt: skip


def taken(log: Path, steps: range, batch: int) -> list[list[int]]:
    """The sorted numbers of the samples that all ranks took in each step, from the notes of `trained_by_ids`."""
    notes = [json.loads(line) for line in log.read_text().splitlines()]
    by_step: dict[int, list[int]] = {}
    for first, count in notes:
        by_step.setdefault(first // batch, []).extend(range(first, first + count))
    return [sorted(by_step[step]) for step in steps]


def test_world_size_one_two_four_one(place, straight, tmp_path):
    """Resumed on other numbers of ranks: identical samples, losses within 1e-6. Incident: torchtitan#811, #1136."""
    config = dataclasses.replace(straight, out=tmp_path / "run", validate_every=20)
    log = tmp_path / "ids"
    for size, steps in [(1, 5), (2, 10), (4, 15), (1, 20)]:
        assert ranks.run(size, rank_jobs.trained_until, config, steps, log) == [steps] * size
    assert taken(log, range(20), 4) == [list(range(4 * step, 4 * step + 4)) for step in range(20)]
    expected, found = ([float.fromhex(loss) for _, loss, _ in losses_of(c)] for c in (straight, config))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_evaluation_is_that_of_one_rank_and_of_the_newest_weights(place, tmp_path, size):
    """Incident: litgpt#2319, a rank without validation samples waits for ever."""
    config = config_of(place, tmp_path / "run", validation_samples=5, micro_batch=1)
    expected = rank_jobs.evaluated(config)
    for found in ranks.run(size, rank_jobs.evaluated, config):
        assert found == pytest.approx(expected, rel=1e-6)
    assert expected[0] - expected[1] > 0.01


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_at_the_start_is_ln_v_however_it_is_launched(place, tmp_path, size):
    """Incidents: Megatron-LM#7452, a list of silent faults of parallel runs; transformers#45994, 47.88 for 11.97."""
    config = config_of(place, tmp_path / "run", micro_batch=1, steps=1, segment_ids=False)
    ranks.run(size, rank_jobs.trained, config)
    (first,) = (record["loss"] for record in read_metrics(config.out) if "loss" in record)
    assert abs(first - math.log(SHAPE.vocab)) < 0.1


def test_two_ranks_export_the_parameters_of_their_checkpoint(straight, tmp_path):
    """One process that goes on from their last checkpoint, at the end, exports the same bytes."""
    config = dataclasses.replace(straight, out=tmp_path / "run")
    ranks.run(2, rank_jobs.trained, config)
    exported = (config.out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(config.out / "model")
    assert train(config).finished
    assert (config.out / "model" / "model.safetensors").read_bytes() == exported


def test_each_node_holds_a_replica_and_its_checkpoint_is_read_by_one_process(straight, tmp_path):
    """Two nodes of two ranks: parameters are sharded in a node and copied to the other (HSDP)."""
    config = dataclasses.replace(straight, out=tmp_path / "run", check_replicas=5)
    ranks.run(4, rank_jobs.trained, config, environment={"LOCAL_WORLD_SIZE": "2"})
    sizes = [
        sum(file.stat().st_size for file in (c.out / "checkpoints" / "step-00000020").glob("*.safetensors"))
        for c in (straight, config)
    ]
    assert sizes[1] < 1.5 * sizes[0], "each number is written by one replica alone"
    expected, found = ([float.fromhex(loss) for _, loss, _ in losses_of(c)] for c in (straight, config))
    assert found == pytest.approx(expected, rel=1e-6)
    exported = (config.out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(config.out / "model")
    assert train(config).finished
    assert (config.out / "model" / "model.safetensors").read_bytes() == exported


def test_every_parameter_takes_part_in_an_update(straight, place):
    """Incident: DeepSpeed#7640, an optimizer that silently changed nothing."""
    before = load_pretrained(place / "hf", "cpu", torch.float32)
    after = load_pretrained(straight.out / "model", "cpu", torch.float32)
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert (old != new).any(), name


def test_nothing_that_an_optimizer_indexes_passes_two_to_the_31():
    """Incidents: DeepSpeed#7640, ms-swift#10023 (flat buffers of all parameters). Ours are one tensor each."""
    model = Phi(loop.PhiConfig.from_preset("xiangxin-3b"), "meta")
    assert max(parameter.numel() for parameter in model.parameters()) < 2**31
    groups = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    rest = sum(p.numel() for p in model.parameters()) - sum(groups)
    assert max(*groups, rest) < 2**31


def test_batch_that_does_not_divide_is_refused(place, tmp_path):
    config = config_of(place, tmp_path / "run", micro_batch=4)
    for end in ranks.start(2, rank_jobs.trained, config).wait():
        assert "expected --batch divisible by --micro-batch 4 x 2 ranks, got 4" in end.error


def test_replicas_that_do_not_divide_are_refused(place, tmp_path):
    (one, two) = ranks.start(2, rank_jobs.trained, config_of(place, tmp_path / "run", replicas=3)).wait()
    assert "expected --replicas to divide 2 ranks, got 3" in one.error
    assert "expected --replicas to divide 2 ranks, got 3" in two.error


def test_host_copies_are_nobody_elses(place):
    """Incident: pytorch#144657, copies of tensors on the CPU that were the tensors themselves."""
    tensors = {"w": torch.arange(6.0)}
    copies = parallel.host_copies(tensors, parallel.ALONE)
    tensors["w"].zero_()
    assert copies["w"].tolist() == [0, 1, 2, 3, 4, 5]
    again = parallel.host_copies(tensors, parallel.ALONE, into=copies)
    assert again["w"].data_ptr() == copies["w"].data_ptr()
    assert not again["w"].any()


def test_what_fails_on_one_rank_is_told_to_all(place):
    def fails():
        raise InputError("this one")

    with pytest.raises(InputError, match="this one"):
        parallel.Team().together(fails)
    assert parallel.Team().first(lambda: {"a": [1]}) == {"a": [1]}


def test_a_start_has_the_store_to_itself_whatever_an_earlier_one_left_there():
    """Incident: nodes that count restarts differently, as torchrun's do, waited for each other until the time limit."""
    store, wait, found = dist.HashStore(), timedelta(seconds=20), {}

    def start(rank):
        found[rank] = parallel._own_part(store, rank, 3, wait)

    store.set("start/1", "of a rank that is dead")
    for number in range(2):
        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(3)]
        for thread in reversed(threads):
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not found[0].check(["here"]), "another start's"
        found[0].set("here", str(number))
        assert [found[rank].get("here") for rank in (1, 2)] == [str(number).encode()] * 2


def test_rank_that_does_not_come_ends_the_start():
    with pytest.raises(InputError, match="expected 2 ranks within 0 s, got 1"):
        parallel._own_part(dist.HashStore(), 0, 2, timedelta(seconds=0.1))


def test_rank_whose_first_does_not_come_says_so(monkeypatch):
    """At the store, which is there; and where there is none."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (settings | {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=f"expected rank 0 at 127.0.0.1:{store.port} within 1 s, got: ") as error:
        parallel.join(timeout=0.6)
    assert (error.value.to_tell, "\n" in str(error.value)) == (True, False)
    with pytest.raises(InputError) as error:
        parallel.join(timeout=0.6)
    assert error.value.to_tell is False, "one of those who wait speaks for all"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(InputError, match=f"expected rank 0 at 127.0.0.1:{port} within 1 s, got: ") as error:
        parallel.join(timeout=0.6)
    assert (error.value.to_tell, "\n" in str(error.value)) == (True, False)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(parallel.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 4)
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="expected a GPU for each of 8 processes, got 4") as error:
        parallel.join()
    assert error.value.to_tell is False, "the first of the node says it"


def test_limit_of_every_collective_lies_beyond_the_watchdogs():
    assert ranks.run(2, rank_jobs.limits, 100.0) == [[200.0, 200.0]] * 2


def test_a_checkpoint_is_written_on_the_ranks_own_device(tmp_path, monkeypatch):
    """The current device is a thread's own: torch's writer would give each rank a context on the first GPU."""
    taken = []
    monkeypatch.setattr(parallel.torch.cuda, "set_device", lambda device: taken.append((device, threading.get_ident())))
    monkeypatch.setattr(saver, "host_copies", lambda tensors, *_, **__: tensors)
    monkeypatch.setattr(saver.checkpoint, "save", lambda *_: taken.append(("saved", threading.get_ident())))
    writer = saver.Saver(tmp_path, 2, parallel.Ranks(rank=3, device=torch.device("cuda", 3)))
    writer.begin({}, {"step": 1})
    assert writer.outcome(wait=True) == (1, None)
    assert [what for what, _ in taken] == [torch.device("cuda", 3), "saved"]
    assert taken[0][1] == taken[1][1] != threading.get_ident()


@pytest.mark.slow
def test_two_torchruns_on_two_nodes_train_one_model(straight, tmp_path):
    """Nodes are two launchers on this machine that meet at a port; each holds a replica."""
    config = dataclasses.replace(straight, out=tmp_path / "run", check_replicas=5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train" / "run.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    nodes = [subprocess.Popen([*command, *command_of(config)], env=ONE_THREAD, cwd=tmp_path, **pipes) for _ in range(2)]
    said = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted(out.count("Finished at step 20") for out, _ in said) == [0, 1], "rank 0 speaks for all"
    assert events_of(config, "start")[0]["ranks"] == 2
    expected, found = ([float.fromhex(loss) for _, loss, _ in losses_of(c)] for c in (straight, config))
    assert found == pytest.approx(expected, rel=1e-6)

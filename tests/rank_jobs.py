"""What tests have ranks do: functions that processes of tests/ranks.py import by name."""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from tests.training import SHAPE, command_of, random_batch
from train import checkpoint, guards, loop, mixture, parallel, run, saver, watchdog
from train.config import TrainConfig
from train.optim import Optimizer
from xiangxin_fast.model import Phi


def trained(config: TrainConfig) -> int:
    """A whole run; its last step."""
    return loop.train(config).step


def commanded(arguments: list[str]) -> None:
    """The command line of train/run.py, which ends the process as it would."""
    sys.argv[1:] = arguments
    run.main()


def out_of_memory(config: TrainConfig, on: list[int]) -> None:
    """The command line of a run in which some ranks find no memory in the third step."""
    watchdog.INTERVAL, watchdog.DEAD_AFTER_ERROR = 0.2, 1.0
    launch, summed = loop._Run._launch, loop._summed_loss

    def full(*arguments):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB\n of which"
        )

    def looked(run):
        loop._summed_loss = full if run.ranks.rank in on and run.position.step == 2 else summed
        launch(run)

    loop._Run._launch = looked
    commanded(command_of(config))


def on_a_full_disk(config: TrainConfig, after: int) -> None:
    """The command line of a run of which only so many checkpoints find room."""
    save, saved = checkpoint.save, []

    def full(folder, tensors, state, team):
        saved.append(state["step"])
        time.sleep(0.05 * team.rank)  # ranks come to know of it at different steps
        if len(saved) > after:
            raise OSError(28, "No space left on device")
        return save(folder, tensors, state, team)

    checkpoint.save = full
    commanded(command_of(config))


def with_no_room_on(config: TrainConfig, rank: int, step: int) -> int:
    """A run in which the kernel refuses one rank's writes beyond 4 KiB while it writes the checkpoint of a step."""
    save, no_limit = checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(folder, tensors, state, team):
        if (team.rank, state["step"]) == (rank, step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, no_limit[1]))
        try:
            return save(folder, tensors, state, team)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)

    checkpoint.save = limited
    return trained(config)


def slow_to_resume(config: TrainConfig, seconds: float) -> int:
    """A run whose rank 0 takes so long to check the checkpoint that it goes on from."""
    verify = checkpoint.verify

    def slowly(path):
        time.sleep(seconds)
        return verify(path)

    checkpoint.verify = slowly
    return trained(config)


def limits(timeout: float) -> list[float]:
    """Seconds that collectives over each dimension of a mesh of replicas may take."""
    ranks = parallel.join(timeout, replicas=2)
    backends = [ranks.mesh.get_group(name)._get_backend(ranks.device) for name in ranks.mesh.mesh_dim_names]
    return [backend.options._timeout.total_seconds() for backend in backends]


def gradients(config: TrainConfig, shape, micro_batches: list[int], replicas: int) -> list[dict]:
    """Loss, whole gradients and global norm of one batch, for each micro-batch; the same on each rank."""
    ranks = parallel.join(replicas=replicas)
    found = []
    for micro_batch in micro_batches:
        model = parallel.shard(Phi(shape).init_weights(0), ranks)
        whole = random_batch(shape.vocab, rows=config.batch, context=config.context)
        size = config.batch // ranks.size
        batch = tuple(array[ranks.rank * size : (ranks.rank + 1) * size] for array in whole)
        settings = TrainConfig(**{**vars(config), "micro_batch": micro_batch})
        loss = parallel.sum_over_ranks(loop.accumulate_gradients(model, batch, settings, ranks), ranks).item()
        grads = {name: whole_of(p.grad).numpy().copy() for name, p in model.named_parameters()}
        optimizer = Optimizer(model, settings)
        squares = ranks.gather(optimizer.squared_norm()[None]).sum() / ranks.replicas
        found.append({"loss": loss, "gradients": grads, "norm": squares.sqrt().item()})
    return found


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """All parts of a sharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def in_bf16(config: TrainConfig) -> dict[str, set[str]]:
    """The dtypes that parameters, gradients and a block's inputs have when the model computes in bf16."""
    ranks = parallel.join()
    model = parallel.shard(Phi(SHAPE).init_weights(0), ranks, compute=torch.bfloat16)
    seen: dict[str, set[str]] = {"x": set(), "cos": set(), "weight": set(), "master": set(), "gradient": set()}

    def look(block, arguments):
        seen["x"].add(str(arguments[0].dtype))
        seen["cos"].add(str(arguments[1].dtype))
        seen["weight"].add(str(block.w_in.dtype))

    for block in model.blocks:
        block.register_forward_pre_hook(look)
    batch = random_batch(SHAPE.vocab, rows=4, context=16)
    loop.accumulate_gradients(
        model, tuple(array[ranks.rank * 2 : ranks.rank * 2 + 2] for array in batch), config, ranks
    )
    for p in model.parameters():
        seen["master"].add(str(p.dtype))
        seen["gradient"].add(str(p.grad.dtype))
    return seen


def trained_until(config: TrainConfig, step: int, log: Path) -> int:
    """A run that is asked to stop, on its last rank alone, so that it does at `step`; notes the samples it takes."""
    batches, launch = mixture.Mixture.batches, loop._Run._launch

    def noted(self, first, count, stop, stride=None):
        for number, batch in enumerate(batches(self, first, count, stop, stride)):
            with log.open("a") as stream:
                stream.write(json.dumps([first + number * (stride or count), count]) + "\n")
            yield batch

    def asked(run):
        if run.position.step + 2 == step and run.ranks.rank == run.ranks.size - 1:
            run.stop_wanted.set()  # known to all when the step after this one is launched
        launch(run)

    mixture.Mixture.batches, loop._Run._launch = noted, asked
    return trained(config)


def evaluated(config: TrainConfig) -> tuple[float, float]:
    """The validation loss before and after an update: the second must be of the new weights."""
    ranks = parallel.join()
    model = parallel.shard(Phi(SHAPE).init_weights(0), ranks)
    held_out = mixture.HeldOut(config.data, config.context, config.seed)
    optimizer = Optimizer(model, config)
    before = loop.evaluate(model, held_out, config, ranks)
    batch = random_batch(SHAPE.vocab, rows=4, context=16)
    size = 4 // ranks.size
    loop.accumulate_gradients(
        model, tuple(array[ranks.rank * size : (ranks.rank + 1) * size] for array in batch), config, ranks
    )
    optimizer.squared_norm()
    optimizer.step(1e-2, torch.tensor(1.0, dtype=torch.float64), torch.tensor(True))
    return before, loop.evaluate(model, held_out, config, ranks)


def with_nan(config: TrainConfig, rank: int, steps: list[int]) -> dict:
    """A run in which one rank's loss is NaN in some steps; hashes of this rank's state before and after each step."""
    launch, summed = loop._Run._launch, loop._summed_loss
    hashes, poisoned = [], False

    def looked(run):
        nonlocal poisoned
        poisoned = run.ranks.rank == rank and run.position.step + 1 in steps
        launch(run)
        poisoned = False
        parts = [parallel.local(tensor).numpy().tobytes() for tensor in run.optimizer.tensors().values()]
        hashes.append(hashlib.sha256(b"".join(parts)).hexdigest())

    loop._Run._launch = looked
    loop._summed_loss = lambda *arguments: summed(*arguments) * (float("nan") if poisoned else 1.0)
    try:
        trained(config)
        return {"hashes": hashes, "error": None}
    except Exception as error:
        return {"hashes": hashes, "error": f"{type(error).__name__}: {error}"}


def with_nan_in_a_gradient(config: TrainConfig, rank: int, step: int) -> int:
    """A run in which one rank's gradient, not its loss, has a NaN in a step."""
    launch, summed = loop._Run._launch, loop._summed_loss

    def poisoned(run):
        def loss_of(model, *arguments):
            loss = summed(model, *arguments)
            if run.ranks.rank == rank and run.position.step + 1 == step:
                loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss

        loop._summed_loss = loss_of
        launch(run)

    loop._Run._launch = poisoned
    return trained(config)


def with_flipped_bit(config: TrainConfig, rank: int, step: int) -> str | None:
    """A run in which a bit of one rank's part of a parameter flips before a step; the error that it ends with."""
    launch = loop._Run._launch

    def flipped(run):
        if run.ranks.rank == rank and run.position.step + 1 == step:
            run.optimizer.parts()[-1].view(torch.int32).flatten()[3] ^= 1
        launch(run)

    loop._Run._launch = flipped
    try:
        trained(config)
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def with_spike(config: TrainConfig, step: int) -> int:
    """A run whose guards see a spike at a step, the first time that it comes there; its last step."""
    judge, seen = guards.Guards.judge, []

    def spiked(self, number, *arguments):
        judge(self, number, *arguments)
        return number == step and (seen or seen.append(number)) is None

    guards.Guards.judge = spiked
    return trained(config)


def digest(tensor: torch.Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def with_late_writes(config: TrainConfig, log: Path) -> int:
    """A run whose checkpoints are written long after they were begun; notes the hashes of what was to be in them."""
    begin, save = saver.Saver.begin, checkpoint.save

    def hashed(self, tensors, state):
        digests = {name: digest(parallel.local(tensor)) for name, tensor in tensors.items()}
        with log.open("a") as stream:
            stream.write(json.dumps([state["step"], self._ranks.rank, digests]) + "\n")
        begin(self, tensors, state)

    def late(*arguments):
        time.sleep(0.3)  # a dozen steps
        return save(*arguments)

    saver.Saver.begin, checkpoint.save = hashed, late
    return trained(config)


def waiting_at(config: TrainConfig, step: int, rank: int, what: str, signs: Path) -> int:
    """A run in which one rank, when it comes to a step, says so and then hangs, dies or goes on in slow steps."""
    launch = loop._Run._launch
    watchdog.INTERVAL, watchdog.DEAD, watchdog.DEAD_AFTER_ERROR = 0.2, 2.0, 1.0

    def waits(run):
        if run.position.step + 1 >= step and run.ranks.rank == rank:
            (signs / f"rank{rank}").write_text(str(os.getpid()))
            if what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600 if what == "hangs" else 0.02)
        launch(run)

    loop._Run._launch = waits
    return trained(config)


def gradient_sums(config: TrainConfig) -> int:
    """How often gradients are summed over the ranks in one step."""
    ranks = parallel.join()
    model = parallel.shard(Phi(SHAPE).init_weights(0), ranks)
    batch = random_batch(SHAPE.vocab, rows=4, context=16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loop.accumulate_gradients(model, batch, config, ranks)
    return sum(event.count for event in profile.key_averages() if event.key.startswith("c10d::_reduce_scatter"))

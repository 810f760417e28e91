"""The processes that train together: the only file of the trainer that knows how parameters are spread over them.

torchrun starts one process for each GPU. FSDP2 keeps of every parameter, its gradient and its moments a part on each
rank, in fp32; before a forward the parts are gathered in bf16 and stay gathered until the backward is done; gradients
are summed in fp32. On several nodes each node holds all the parts (HSDP), so that parameters travel inside it alone.
One process on a CPU is not distributed at all: ALONE.

Of a group of processes on the host, `Team` says who is in it and lets them decide together. There are two, on gloo: one
for the training loop, and a more patient one for checkpoints. A thread writes those, and threads must never share a
group: the loop takes the second, to read one, only while that thread is not there.
"""

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from xiangxin_fast.errors import InputError

PATIENCE_WITH_DISKS = 6  # times the limit of other waits


class TeamError(InputError):
    """What failed on one rank, told to all of them."""


@dataclass(frozen=True)
class Team:
    """Processes that talk on the host, in lockstep: each of its methods is called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def gather(self, value: object) -> list:
        """Each rank's `value` (JSON), by rank."""
        if self.group is None:
            return [value]
        texts: list = [None] * self.size
        dist.all_gather_object(texts, json.dumps(value), group=self.group)
        return [json.loads(text) for text in texts]

    def together(self, action: Callable[[], object]) -> list:
        """What `action` gives on each rank (JSON). TeamError on every rank where it fails on one (InputError, OSError).

        Without this, a rank that fails leaves the others waiting for it in the next call.
        """
        value = error = None
        try:
            value = action()
        except (InputError, OSError) as failure:
            if self.group is None:
                raise
            error = str(failure)
        results = self.gather([value, error])
        for rank, (_, failure) in enumerate(results):
            if failure is not None:
                raise TeamError(failure if rank == 0 else f"rank {rank}: {failure}")
        return [value for value, _ in results]

    def first(self, action: Callable[[], object]) -> object:
        """What `action` gives on rank 0, which alone does it."""
        return self.together(lambda: action() if self.rank == 0 else None)[0]

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return any(self.gather(flag))


@dataclass(frozen=True)
class Ranks:
    """This process and those it trains with. `mesh` is [replicas, shards], or [shards] where there is one replica."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None  # None: one process, nothing is sharded
    host_mesh: DeviceMesh | None = None  # the same ranks, for copies on the host
    control: Team = Team()
    saving: Team = Team()
    store: dist.Store | None = None

    @property
    def replicas(self) -> int:
        return self.mesh.size(0) if self.mesh is not None and self.mesh.ndim == 2 else 1

    def gather(self, report: Tensor) -> Tensor:
        """Each rank's `report` [n] as [size, n], on the device and the same on all ranks; the host does not wait."""
        if self.mesh is None:
            return report[None]
        reports = report.new_empty(self.size, len(report))
        dist.all_gather(list(reports), report)
        return reports


ALONE = Ranks()


def join(timeout: float = 600.0, replicas: int | None = None) -> Ranks:
    """The ranks that torchrun started, of which this process is one; without torchrun and GPUs, ALONE.

    `timeout` (seconds) bounds every wait for another rank. `replicas`: how many copies of the model there are, each
    over size / replicas ranks; by default one for each node. InputError where that does not divide.
    """
    size, cuda = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    if size == 1 and not cuda:
        return ALONE
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    replicas = replicas or max(1, size // local_size)
    if size % replicas:
        raise InputError(f"training: expected --replicas to divide {size} ranks, got {replicas}")
    if cuda and local_size > (gpus := torch.cuda.device_count()):
        error = InputError(f"training: expected a GPU for each of {local_size} processes, got {gpus}")
        error.to_tell = os.environ.get("LOCAL_RANK") == "0"  # other nodes may have enough
        raise error
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    wait, store = timedelta(seconds=timeout), None
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=wait)) if size > 1 else (dist.HashStore(), 0, 1)
        store = _own_part(store, rank, size, wait)
    except dist.DistError as error:  # what stores raise
        master = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        told = " ".join(str(error).split())
        absent = InputError(f"training: expected rank 0 at {master} within {timeout:.0f} s, got: {told}")
        absent.to_tell = first_to_say("rank 0 is absent", store)
        raise absent from None
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # Twice: a collective is launched before the loop last says that it goes on, and NCCL, which would end the process
    # without naming who is missing, must not come before the watchdog.
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=2 * wait)
    shape, names = ((replicas, size // replicas), ("replicas", "shards")) if replicas > 1 else ((size,), ("shards",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for name in names:
        _set_pg_timeout(2 * wait, mesh.get_group(name))  # a mesh's own groups have torch's limit, not the first's
    host_mesh = init_device_mesh("cpu", shape, mesh_dim_names=names) if cuda else mesh
    # Ranks finish writing their parts of a checkpoint long after one another.
    waits = (wait, PATIENCE_WITH_DISKS * wait)
    teams = [Team(rank, size, dist.new_group(backend="gloo", timeout=limit)) for limit in waits]
    return Ranks(rank, size, device, mesh, host_mesh, *teams, store)


def _own_part(store: dist.Store, rank: int, size: int, wait: timedelta) -> dist.Store:
    """The part of `store` that the ranks of this start have to themselves, which the first of them names.

    torchrun keeps its store when it starts ranks again: addresses of dead ones are still in it. Its count of restarts
    does not tell starts apart, since a node that starts anew because another did leaves it as it is. So each rank asks
    under a name never used before, and the first answers until all have heard.
    """
    store.set_timeout(wait)
    mine, end = uuid.uuid4().hex, time.monotonic() + wait.total_seconds()
    store.set(f"start/{rank}", mine)
    if rank > 0:
        name = store.get(f"start/{mine}").decode()
        store.add(f"started/{name}", 1)
        return dist.PrefixStore(name, store)
    while (others := store.add(f"started/{mine}", 0)) < size - 1:
        if time.monotonic() > end:
            raise InputError(f"training: expected {size} ranks within {wait.total_seconds():.0f} s, got {1 + others}")
        for asking in (f"start/{other}" for other in range(1, size)):
            if store.check([asking]):
                store.set(f"start/{store.get(asking).decode()}", mine)
        time.sleep(0.02)
    return dist.PrefixStore(mine, store)


def _notes() -> dist.Store | None:
    """What one launch of torchrun keeps while it starts its ranks again and again; None where nothing does."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore("launch", store)


def begun_at() -> int | None:
    """The step at which this launch of torchrun began the run, if an earlier start of its ranks did; else None.

    Its count of restarts does not tell: nodes that join, or leave, restart the others without one.
    """
    notes = _notes()
    return int(notes.get("begun")) if notes is not None and notes.check(["begun"]) else None


def note_begun(step: int) -> None:
    """Lets later starts know where the first began."""
    if (notes := _notes()) is not None:
        notes.compare_set("begun", "", str(step))


def first_to_say(what: str, store: dist.Store | None) -> bool:
    """Whether no other rank has said `what` before; true, too, where they cannot be asked any more."""
    try:
        return store is None or store.add(f"said/{hashlib.sha256(what.encode()).hexdigest()}", 1) == 1
    except RuntimeError:
        return True


def use_device(ranks: Ranks) -> None:
    """Makes this rank's device that of the calling thread: a new thread's is the first GPU, which all would crowd."""
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)


def leave(ranks: Ranks) -> None:
    """Ends what `join` began, once all ranks are done."""
    if ranks.mesh is not None:
        dist.destroy_process_group()


def place() -> str:
    """Where this process is, for people: host and process id."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def shard(model: nn.Module, ranks: Ranks, compute: torch.dtype | None = None, *, reshard: bool = False) -> nn.Module:
    """Spreads the parameters of `model` over the ranks, in place: each block is gathered by itself, the rest together.

    `compute`: dtype of the gathered parameters, by default bf16 on a GPU and fp32 on a CPU. `reshard`: free a block's
    gathered parameters after its forward and gather them again for its backward.
    """
    if ranks.mesh is None:
        return model
    if compute is None:
        compute = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    # Forward's inputs stay as they are: cos and sin are fp32, and in bf16 positions beyond 256 would be one.
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=ranks.mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(model, mesh=ranks.mesh, mp_policy=precision, reshard_after_forward=reshard)
    register_fsdp_forward_method(model, "loss")  # other methods would meet parameters that nobody has gathered
    for module in _sharded_modules(model):
        # Each sums gradients, since the loss is divided by the valid targets of all ranks. The root's setting is its
        # own: on the root alone, the gradients of the blocks would come out divided by the number of ranks.
        module.set_force_sum_reduction_for_comms(True)
        if ranks.size > 1:  # alone there is nothing to divide by, and FSDP would divide by 1.0 into a copy
            module.set_gradient_divide_factor(1.0)
    return model


def _sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def sum_gradients_now(model: nn.Module, now: bool) -> None:
    """Whether the next backward sums gradients over the ranks, or keeps them for a later one that does.

    A backward that only keeps them leaves the parameters gathered: the next micro-batch needs them as they are.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_is_last_backward(now)
        model.set_reshard_after_backward(now)


def forget_gathered(model: nn.Module) -> None:
    """Frees parameters that a forward without backward left gathered: they stand in the model instead of its own."""
    for module in _sharded_modules(model):
        module.reshard()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device; the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def device_name(ranks: Ranks) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"


def sum_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    """`value` summed over the ranks, in place, on its device; the host does not wait."""
    if ranks.mesh is not None:
        dist.all_reduce(value)
    return value


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, parameter: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """`part` as this rank's part of a tensor spread as `parameter` is, on `mesh` (default: the parameter's)."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        mesh or parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def host_copies(tensors: dict[str, Tensor], ranks: Ranks, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies of `tensors` on the host that nothing else refers to, complete on return; `into`: earlier ones."""
    copies = {}
    for name, tensor in tensors.items():
        part = local(tensor)
        pinned = part.device.type == "cuda"
        copy = local(into[name]) if into else torch.empty_like(part, device="cpu", pin_memory=pinned)
        copies[name] = like(copy.copy_(part, non_blocking=True), tensor, ranks.host_mesh)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return copies


@torch.no_grad()
def gathered(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """On rank 0, each whole parameter by name: on the host where the model is sharded. Elsewhere, nothing."""
    if ranks.mesh is None:
        return {name: parameter.detach() for name, parameter in model.named_parameters()}
    whole = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor()
        if ranks.rank == 0:
            whole[name] = full.cpu()
    return whole


def fingerprint(parts: list[Tensor]) -> Tensor:
    """A 64-bit number that no single flipped bit leaves as it is: the 32-bit words times odd numbers, modulo 2**64."""
    total = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    for part in parts:
        words = part.contiguous().view(torch.int32).flatten()
        odd = torch.arange(1, 2 * words.numel() + 1, 2, device=words.device)
        total = total * 31 + (words * odd).sum()
    return total


def disagreeing_ranks(parts: list[Tensor], ranks: Ranks) -> list[list[int]]:
    """Of each group of ranks that hold copies of one another's `parts`, those groups where the copies differ."""
    prints = ranks.gather(fingerprint(parts)[None])[:, 0].tolist()
    shards = ranks.size // ranks.replicas
    groups = [list(range(shard, ranks.size, shards)) for shard in range(shards)]
    return [group for group in groups if len({prints[rank] for rank in group}) > 1]

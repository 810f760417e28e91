"""The parallel block inside FSDP2, where its saved weights go after the forward and come back for the backward."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from tests import ranks
from tests.conftest import INTERPRET
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.model import Phi

pytestmark = [pytest.mark.interpreter] if INTERPRET else []

# 3C + F = 88, and two rows of b_out: what is sharded are rows.
TINY = PhiConfig(vocab=32, channels=16, layers=2, heads=1, rotary_dim=8, mlp_hidden=40, context=8, eos_id=0)
RANKS, STEPS, RATE = 2, 2, 0.5


def rows_of(rank: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, TINY.vocab, (1, 9), generator=torch.Generator().manual_seed(rank))
    return tokens[:, :-1], tokens[:, 1:]


def sharded_gradients() -> list[dict[str, np.ndarray]]:
    """A rank's part of the test: the whole gradients of each step."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,))
    model = Phi(TINY).init_weights(0)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    for name, parameter in model.named_parameters():
        assert parameter.to_local().shape[0] == parameter.shape[0] // RANKS, name
    steps = []
    for _ in range(STEPS):
        model.loss(*rows_of(dist.get_rank())).backward()
        steps.append({name: p.grad.full_tensor().numpy() for name, p in model.named_parameters()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
    dist.destroy_process_group()
    return steps


def test_gradients_of_two_ranks_are_those_of_one_process():
    """In every bit: each rank's are those of its rows, and the mean of two floats is the same in any order."""
    found = ranks.run(RANKS, sharded_gradients)
    model = Phi(TINY).init_weights(0)
    for step in range(STEPS):
        by_rank = [torch.autograd.grad(model.loss(*rows_of(rank)), list(model.parameters())) for rank in range(RANKS)]
        means = [sum(parts) / RANKS for parts in zip(*by_rank, strict=True)]
        for (name, parameter), mean in zip(model.named_parameters(), means, strict=True):
            for rank in range(RANKS):
                got = found[rank][step][name]
                assert np.array_equal(got, mean.numpy()), f"{name}, rank {rank}, step {step}"
            parameter.data -= RATE * mean

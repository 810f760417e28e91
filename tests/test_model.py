"""Phi and its reference against transformers' PhiForCausalLM, and what Phi promises besides."""

import pytest
import torch

from tests.hf import fuse, grads_of, oracle
from tests.numerics import assert_no_worse_than_torch
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.errors import InputError
from xiangxin_fast.kv_cache import KVCache
from xiangxin_fast.layout import native_tensors
from xiangxin_fast.model import Phi
from xiangxin_fast.reference import PhiReference


def small(heads: int, head_dim: int, rotary_dim: int, **others) -> PhiConfig:
    shape = {"vocab": 131, "layers": 2, "mlp_hidden": 4 * heads * head_dim, "context": 64} | others
    return PhiConfig(channels=heads * head_dim, heads=heads, rotary_dim=rotary_dim, **shape)


# Every head_dim of the family (64: phi-1 and phi-1.5, 80: phi-2) and 96, every fraction that is rotated somewhere.
# int(64 * 0.4) is odd, which no rotary embedding can be: test_hostile_files has that one refused.
CONFIGS = {
    "phi-1.5, scaled down": small(4, 64, 32, layers=3),
    "phi-2, scaled down": small(4, 80, 32, layers=3),
    "head_dim 64, a quarter rotated": small(2, 64, 16),
    "head_dim 64, all rotated, tied": small(2, 64, 64, tied_head=True),
    "head_dim 80, a quarter rotated": small(3, 80, 20),
    "head_dim 80, half rotated, tied": small(2, 80, 40, tied_head=True),
    "head_dim 80, all rotated, one head": small(1, 80, 80),
    "head_dim 96, 0.4 rotated (38)": small(2, 96, 38),
    "head_dim 96, a quarter rotated, other theta and eps": small(2, 96, 24, rope_theta=500.0, eps=1e-3),
    "mlp narrower than 4C": small(2, 64, 32, mlp_hidden=96),
}


def batch(config: PhiConfig, rows: int = 2, T: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their shifted targets, two of which are ignored."""
    stream = torch.randint(config.vocab, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    tokens, targets = stream[:, :-1], stream[:, 1:].clone()
    targets[0, :2] = -100
    return tokens, targets


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_reference_and_model_equal_transformers(config):
    hf = oracle(config)
    tokens, targets = batch(config)
    # transformers shifts its labels itself: the last target has no place, so the loss is taken from the logits.
    logits = hf(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    expected = grads_of(hf)

    reference = PhiReference(config)
    reference.load_state_dict(hf.state_dict())
    model = fuse(config, hf.state_dict())
    for ours in (reference, model):
        assert relative(ours(tokens), logits) <= 1e-5
        ours_loss = ours.loss(tokens, targets)
        assert relative(ours_loss, loss) <= 1e-6
        ours_loss.backward()

    for name, gradient in grads_of(reference).items():
        assert relative(gradient, expected[name]) <= 1e-5, name
    fused = native_tensors(config, grads_of(model))
    assert fused.keys() == expected.keys()
    for name, gradient in fused.items():
        assert relative(gradient, expected[name]) <= 1e-5, name

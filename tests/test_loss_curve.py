"""Training with fused weights and the parallel block gives the loss curve of the separate ops of reference.py."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.training import make_text
from xiangxin_fast import save_pretrained
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.model import Phi
from xiangxin_fast.reference import PhiReference

# The demo's model with a sixth of its width: heads of 80, of which 32 dims rotate.
SMALL = dataclasses.replace(PhiConfig.from_preset("demo"), vocab=64, channels=80, heads=1, mlp_hidden=320, context=64)
STEPS = 30


def batches(rows: int = 4, context: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Rows of a made text, its characters numbered; targets are shifted by one."""
    text = make_text(STEPS * rows, seed=0)
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text])[: STEPS * rows * (context + 1)]
    return [(row[:, :-1], row[:, 1:]) for row in tokens.view(STEPS, rows, context + 1)]


def curve(model: nn.Module) -> Tensor:
    """The loss of each step of AdamW, warmed up and clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step, batch in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 5)
        loss = model.loss(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_the_demo_trains_as_with_separate_ops(tmp_path):
    fused, separate = Phi(SMALL).init_weights(0), PhiReference(SMALL)
    save_pretrained(fused, tmp_path)
    separate.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with_block, with_ops = curve(fused), curve(separate)
    assert with_ops[-1] < 0.7 * with_ops[0]
    assert with_block.tolist() == pytest.approx(with_ops.tolist(), rel=1e-5)

"""Inputs of the attention tests, and the tiles they run with in the interpreter."""

import importlib

import torch
from torch import Tensor
from xiangxin_kernels._tuning import AttentionConfig

# The package's front door binds the name of the module to the op.
module = importlib.import_module("xiangxin_kernels.attention")


def rotary(S: int, R: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """cos, sin [S, R/2] in fp32; None for R = 0."""
    if R == 0:
        return None, None
    angles = torch.arange(S)[:, None] * 10000.0 ** (-torch.arange(R // 2) / (R // 2))
    return angles.cos(), angles.sin()


def documents(B: int, S: int, seed: int = 0, mean: int = 12) -> Tensor:
    """segment_ids [B, S]: runs of random lengths, `mean` on average."""
    new = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 1 / mean
    return new.cumsum(dim=1).int()


def problem(
    T: int, D: int = 80, R: int = 32, *, B: int = 1, H: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor | None]:
    """q, k, v of normal noise, and the angles of their positions."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, H, D, generator=generator).to(dtype) for _ in range(3))
    cos, sin = rotary(T, R)
    return {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}


def use_tiles(monkeypatch, block_m: int, block_n: int, heads_per_group: int = 2) -> None:
    """Small tiles put many borders into a short sequence; the kernels are the same for any power of two from 16."""
    config = AttentionConfig(block_m, block_n, num_warps=4, num_stages=1, heads_per_group=heads_per_group)
    monkeypatch.setattr(module, "choose_attention", lambda *_: config)

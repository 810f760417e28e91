"""Inputs of the tests of the parallel block and its GEMMs, and the three ways of their products."""

import importlib

import torch
from torch import Tensor
from xiangxin_kernels._tuning import GemmConfig

gemm = importlib.import_module("xiangxin_kernels.gemm")

# Tiles small enough that a few dozen rows and columns cross their borders.
_TILES = {"block_m": 32, "block_n": 32, "block_k": 16, "num_warps": 4, "num_stages": 2, "group_m": 2}
WAYS = {
    "cublas": None,
    "pointers": GemmConfig(**_TILES),
    "descriptors": GemmConfig(**_TILES, descriptors=True),
}


def use_way(monkeypatch, way: str) -> None:
    """Sends every product with an epilogue the given way, whatever the shape."""
    monkeypatch.setattr(gemm, "fuses_gemm", lambda *given: WAYS[way] is not None)
    monkeypatch.setattr(gemm, "choose_gemm", lambda *given: WAYS[way])


def with_other_strides(x: Tensor) -> Tensor:
    """x with a last axis that is not contiguous: a matrix as its transpose lies, a vector among other numbers."""
    if x.dim() == 1:
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=1)[:, 0]
    return x.t().contiguous().t()


def rotary_tables(S: int, R: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(S).double(), 1e4 ** (-torch.arange(0, R, 2).double() / R))
    return angles.cos().float(), angles.sin().float()


def block_inputs(
    B: int, T: int, H: int, D: int, R: int, F: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What `parallel_block` takes by position, scaled so that every branch contributes alike."""
    generator = torch.Generator().manual_seed(B * T + H * D + F)
    C = H * D

    def noise(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    cos, sin = rotary_tables(T, R)
    return {
        "x": noise(B, T, C),
        "ln_w": 1 + noise(C, scale=0.1),
        "ln_b": noise(C, scale=0.1),
        "w_in": noise(3 * C + F, C, scale=C**-0.5),
        "b_in": noise(3 * C + F, scale=0.1),
        "w_out": noise(C, C + F, scale=F**-0.5),
        "b_out": noise(2, C, scale=0.1),
        "cos": cos,
        "sin": sin,
    }

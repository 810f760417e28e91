"""Inputs of the tests of decode's ops, small and of odd sizes."""

import torch

# Rows whose lengths are: the shortest, one below, at and above a multiple of the vector width, the whole cache.
LENGTHS = torch.tensor([1, 31, 32, 33, 96])


def attention_inputs(dtype: torch.dtype, lengths: torch.Tensor = LENGTHS, H: int = 3, D: int = 80, S: int = 96) -> dict:
    generator = torch.Generator().manual_seed(0)
    B = len(lengths)
    q, k, v = (torch.randn(B, *shape, generator=generator).to(dtype) for shape in ((H, D), (S, H, D), (S, H, D)))
    return {"q": q, "k_cache": k, "v_cache": v, "lengths": lengths}


def block_inputs(
    dtype: torch.dtype,
    positions: torch.Tensor,
    H: int = 3,
    D: int = 80,
    R: int = 32,
    hidden: int = 500,
    S: int = 64,
) -> dict:
    """Inputs of decode_block; hidden is no multiple of a vector, so rows of its GELU end within one."""
    generator = torch.Generator().manual_seed(1)
    B, C = len(positions), H * D

    def noise(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    angles = torch.outer(torch.arange(S), 100.0 ** (-torch.arange(0, R, 2) / R))
    return {
        "x": noise(B, C),
        "ln_w": 1 + noise(C, scale=0.1),
        "ln_b": noise(C, scale=0.1),
        "w_in": noise(3 * C + hidden, C, scale=C**-0.5),
        "b_in": noise(3 * C + hidden, scale=0.1),
        "w_out": noise(C, C + hidden, scale=C**-0.5),
        "b_out": noise(2, C, scale=0.1),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "k_cache": noise(B, S, H, D),
        "v_cache": noise(B, S, H, D),
        "positions": positions,
        "heads": H,
    }


def appended(op):
    """`op` on copies of the caches, returning those beside its result: `check_op` wants inputs left alone."""

    def run(*, k_cache, v_cache, **inputs):
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        return op(k_cache=k_cache, v_cache=v_cache, **inputs), k_cache, v_cache

    return run


def head_inputs(dtype: torch.dtype, rows: int = 5) -> dict:
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (rows, 240), "ln_w": (240,), "ln_b": (240,), "head_w": (131, 240), "head_b": (131,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def row_of(inputs: dict, row: int, batched: tuple[str, ...]) -> dict:
    return {name: x[row : row + 1].clone() if name in batched else x for name, x in inputs.items()}


POSITIONS = torch.tensor([0, 30, 31, 63, 5])
BLOCK_ROWS = ("x", "k_cache", "v_cache", "positions")

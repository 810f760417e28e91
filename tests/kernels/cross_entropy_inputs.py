"""Inputs of the tests of cross-entropy: random, as a trained model has them, and hostile."""

import math

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def problem(
    N: int, V: int, C: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0, ignored: float = 0.2
) -> dict:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = -100
    return {
        "x": torch.randn(N, C, generator=generator).to(dtype),
        "weight": (torch.randn(V, C, generator=generator) / math.sqrt(C)).to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "targets": targets,
    }


def plain_problem(N: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    given = problem(N, V, dtype=dtype, seed=seed)
    return {
        "logits": torch.nn.functional.linear(given["x"], given["weight"], given["bias"]),
        "targets": given["targets"],
    }


def confident(N: int, V: int, p: float, dtype: torch.dtype) -> dict:
    """Logits as a trained model's: the true class has probability p, give or take a little, and the others the rest."""
    targets = torch.arange(N) % V
    # Without noise all errors were one and the same rounding, and a mean over them a matter of luck.
    logits = 0.1 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(N), targets] += math.log(p / (1 - p) * max(V - 1, 1))
    return {"logits": logits.to(dtype), "targets": targets}


def hostile(kind: str, dtype: torch.dtype) -> dict:
    N, V = 19, 130
    inputs = plain_problem(N, V, dtype)
    targets = inputs["targets"].clamp(min=0)
    if kind == "uniform":
        inputs["logits"].zero_()
    elif kind == "one-hot":
        inputs["logits"] = torch.nn.functional.one_hot(targets, V).to(dtype) * 100
    elif kind == "huge":
        inputs["logits"] = (inputs["logits"].sign() * 1e4).to(dtype)
    elif kind == "huge and near":
        inputs["logits"] = (1e4 + inputs["logits"].float()).to(dtype)
    elif kind == "-inf columns":
        inputs["logits"][:, ::3] = float("-inf")
    elif kind == "-inf target":
        inputs["logits"][torch.arange(N), targets] = float("-inf")
    elif kind == "+inf":
        inputs["logits"][::2, 5] = float("inf")
    elif kind == "nan":
        inputs["logits"][::2, 7] = float("nan")
    return {**inputs, "targets": targets}

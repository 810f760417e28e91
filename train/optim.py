"""AdamW over two parameter groups, the learning-rate schedule, and the optimizer's state as named tensors."""

import math

import torch
from torch import Tensor, nn

from .config import TrainConfig

DECAYED = frozenset({"w_in", "w_out", "head_w"})  # as Phi names them


def learning_rate(progress: float, config: TrainConfig) -> float:
    """The rate at `progress` 0..1 of the run: linear over the warm-up, then half a cosine down to lr * lr_floor."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    down = (progress - config.warmup) / (1 - config.warmup) if config.warmup < 1 else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(down, 1.0)))
    return config.lr * (config.lr_floor + (1 - config.lr_floor) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: matrices that multiply activations decay; biases, LayerNorms and the embedding do not.

    The embedding is a table: decay would shrink the rows of rare tokens, which seldom get a gradient to answer with
    (OLMo 2, arXiv:2501.00656, found training steadier without). A tied head is the embedding.
    """
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.rsplit(".")[-1] in DECAYED].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW for `model`, its moments already there (zero), so that saving and loading see one form of state."""
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def set_step(optimizer: torch.optim.AdamW, step: int) -> None:
    """Tells AdamW's bias correction that `step` updates were made."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


def named_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What a checkpoint holds: parameters as model.<name>, AdamW's moments as exp_avg.<name> and exp_avg_sq.<name>."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors

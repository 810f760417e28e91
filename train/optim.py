"""AdamW over this rank's part of every parameter, the learning-rate schedules, and the state as named tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .parallel import like, local

DECAYED = frozenset({"w_in", "w_out", "head_w"})  # as Phi names them


def learning_rate(progress: float, config: TrainConfig) -> float:
    """The rate at `progress` 0..1 of the run: linear over the warm-up, then down to lr * lr_floor as --schedule says.

    cosine: half a cosine over the rest. wsd (warm-up, stable, decay; arXiv:2404.06395): constant until the last `decay`
    of the run, then 1 - sqrt, which ended lower than a line (arXiv:2405.18392); what was trained at the constant rate
    can be trained further, or decayed, from any of its checkpoints.
    """
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    if config.schedule == "wsd":
        down = (progress - (1 - config.decay)) / config.decay
        height = 1 - math.sqrt(min(max(down, 0.0), 1.0))
    else:
        down = (progress - config.warmup) / (1 - config.warmup) if config.warmup < 1 else 1.0
        height = 0.5 * (1 + math.cos(math.pi * min(down, 1.0)))
    return config.lr * (config.lr_floor + (1 - config.lr_floor) * height)


def parameter_groups(parameters: Mapping[str, Tensor], weight_decay: float) -> list[dict]:
    """Two AdamW groups: matrices that multiply activations decay; biases, LayerNorms and the embedding do not.

    The embedding is a table: decay would shrink the rows of rare tokens, which seldom get a gradient to answer with
    (OLMo 2, arXiv:2501.00656, found training steadier without). A tied head is the embedding.
    """
    groups = {True: [], False: []}
    for name, parameter in parameters.items():
        groups[name.rsplit(".")[-1] in DECAYED].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


class Optimizer:
    """Fused AdamW with clipping for `model`. It sees plain tensors: this rank's parts of parameters and gradients.

    Its moments are there (zero) from the start, so that saving and loading see one form of state.
    """

    def __init__(self, model: nn.Module, config: TrainConfig):
        self._clip = config.clip
        self._named = dict(model.named_parameters())
        self._parts = {name: local(parameter).detach() for name, parameter in self._named.items()}
        groups = parameter_groups(self._parts, config.weight_decay)
        self._adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
        for part in self._parts.values():
            step = torch.zeros((), dtype=torch.float32, device=part.device)
            moments = {"exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part)}
            self._adamw.state[part] = {"step": step, **moments}

    def squared_norm(self) -> Tensor:
        """Sum of squares of this rank's parts of the gradients, which it takes over from the model: fp64 scalar."""
        for part, parameter in zip(self._parts.values(), self._named.values(), strict=True):
            part.grad, parameter.grad = local(parameter.grad), None
        norms = torch._foreach_norm([part.grad for part in self._parts.values()])
        return torch.stack(norms).double().square().sum()

    @torch.no_grad()
    def step(self, lr: float, norm: Tensor, finite: Tensor) -> None:
        """One update at rate `lr` of gradients of global norm `norm`, clipped; none where `finite` is false.

        `norm` and `finite` are scalars on the device: the host does not wait for them.
        """
        coefficient = (self._clip / (norm + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_([part.grad for part in self._parts.values()], coefficient)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.found_inf = (~finite).float()  # fused AdamW then leaves parameters, moments and its step alone
        self._adamw.step()
        for part in self._parts.values():
            part.grad = None

    @property
    def updates(self) -> int:
        """Updates made, those left out not counted: what AdamW corrects its bias by."""
        return int(next(iter(self._adamw.state.values()))["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self._adamw.state.values():
            state["step"].fill_(count)

    def parts(self) -> list[Tensor]:
        """This rank's parts of the parameters."""
        return list(self._parts.values())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: parameters as model.<name>, AdamW's moments as exp_avg.<name>, exp_avg_sq.<name>."""
        tensors = {}
        for name, parameter in self._named.items():
            tensors[f"model.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = like(self._adamw.state[self._parts[name]][moment], parameter)
        return tensors

    def all_finite(self) -> bool:
        """Whether this rank's parts of parameters and moments are; waits for the device."""
        parts = [part for tensor in self.tensors().values() if (part := local(tensor)).numel()]
        return bool(torch.stack(torch._foreach_norm(parts, math.inf)).isfinite().all())

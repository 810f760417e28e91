"""Training steps of the full model: bf16 weights with fp32 masters under fused AdamW, on one device.

MFU divides the FLOPs of PhiConfig.flops_per_token by the device's datasheet rate; beside it stands the share of the
measured ceiling.
"""

import gc
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.gpus import gpu_called
from xiangxin_fast.config import PhiConfig
from xiangxin_fast.model import Phi

from .case import Shape, compiled
from .hugging_face import causal_lm
from .measure import interleaved

Loss = Callable[[Tensor, Tensor], Tensor]

MICRO_BATCHES = (16, 8, 4, 2, 1)
NUMBERS_PER_GROUP = 1 << 28  # of the gradients that are fp32 at one time
LEARNING_RATE = 1e-4


class MasterAdamW:
    """AdamW on fp32 copies of a model's parameters, with clipping; whole gradients never exist in fp32."""

    def __init__(self, model: nn.Module):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.groups: list[tuple[list[nn.Parameter], list[Tensor], torch.optim.AdamW]] = []
        group: list[nn.Parameter] = []
        for p in self.parameters:
            group.append(p)
            if sum(q.numel() for q in group) >= NUMBERS_PER_GROUP or p is self.parameters[-1]:
                masters = [q.detach().float() for q in group]
                adamw = torch.optim.AdamW(masters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
                self.groups.append((group, masters, adamw))
                group = []

    def step(self) -> None:
        """One update from the parameters' gradients, which it takes away."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        with torch.no_grad():
            for group, masters, adamw in self.groups:
                for p, master in zip(group, masters, strict=True):
                    master.grad, p.grad = p.grad.float(), None
                adamw.step()
                adamw.zero_grad(set_to_none=True)
                torch._foreach_copy_(group, masters)


def random_model(config: PhiConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Phi:
    """Phi with weights drawn on the device: normal matrices and biases, LayerNorms around one."""
    model = Phi(config, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("ln_w") else 0.0, config.init_std, generator=generator)
    return model


class _HuggingFaceLoss(nn.Module):
    """transformers' model with each layer, and the head with its loss, compiled as a region of its own."""

    def __init__(self, hf: nn.Module, shape: Shape):
        super().__init__()
        self.hf = hf
        for layer in hf.model.layers:
            layer.forward = compiled(layer.forward, shape)
        self.head = compiled(self._head_loss, shape)

    def _head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.hf.lm_head(x).float().flatten(0, 1), targets.flatten())

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.head(self.hf.model(tokens, use_cache=False).last_hidden_state, targets)

    def eager(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return self(tokens, targets)


def _free(work) -> None:
    gc.collect()
    if work.device.type == "cuda":
        torch.cuda.empty_cache()


def _batch(work, B: int) -> tuple[Tensor, Tensor]:
    """Random tokens [B, T] and their targets."""
    generator = torch.Generator(work.device).manual_seed(1)
    shape = (B, work.shape.T + 1)
    tokens = torch.randint(work.shape.config.vocab, shape, device=work.device, generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _fits(work, trial: Loss, optimizer: MasterAdamW, B: int) -> bool:
    """Whether forward and backward of B sequences find memory beside the optimizer's state. Leaves no gradients."""
    try:
        trial(*_batch(work, B)).backward()
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    for p in optimizer.parameters:
        p.grad = None
    _free(work)
    return fits


def _bench(work, provider: str, model: nn.Module, loss: Loss, trial: Loss) -> None:
    """Steps at the largest micro-batch that `trial`, the loss without compilation, finds memory for."""
    optimizer = MasterAdamW(model)
    tries = MICRO_BATCHES[-2:] if work.dry_run else MICRO_BATCHES
    trial(*_batch(work, tries[-1])).backward()
    optimizer.step()  # with the first step come AdamW's moments
    B = next(B for B in tries if _fits(work, trial, optimizer, B))
    record = _steps(work, loss, optimizer, _batch(work, B))
    work.emit(record | {"kind": "train", "provider": provider, "micro_batch": B, "T": work.shape.T})


def _steps(work, loss, optimizer: MasterAdamW, batch: tuple[Tensor, Tensor]) -> dict:
    losses = []

    def forward_backward(start) -> None:
        start()
        value = loss(*batch)
        value.backward()
        losses.append(value.detach())
        for p in optimizer.parameters:
            p.grad = None

    def step(start) -> None:
        start()
        value = loss(*batch)
        value.backward()
        losses.append(value.detach())
        optimizer.step()

    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = 0.0 if work.dry_run else max(work.left / 2, 1.0)
    turns = {"step": step, "forward_backward": forward_backward}
    timings, failed = interleaved(turns, work.device, seconds, flush=False)
    if failed:
        raise RuntimeError(f"training step: {failed}")
    first, last = float(losses[0]), float(losses[-1])
    if not (math.isfinite(last) and last < first):
        raise RuntimeError(f"training step: expected the loss of a repeated batch to fall, got {first} then {last}")

    B, T = batch[0].shape
    step_s = timings["step"].median / 1e3
    causal, full = work.shape.config.flops_per_token(T)
    tokens_per_s = B * T / step_s
    record = {
        "ms": timings["step"].median,
        "p20": timings["step"].p20,
        "p80": timings["step"].p80,
        "rounds": timings["step"].rounds,
        "forward_backward_ms": timings["forward_backward"].median,
        "tokens_per_s": tokens_per_s,
        "tflops_causal": causal * tokens_per_s / 1e12,
        "tflops_full": full * tokens_per_s / 1e12,
        "first_loss": first,
        "last_loss": last,
    }
    if work.device.type == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
        if gpu := gpu_called(torch.cuda.get_device_name()):
            record["mfu_causal"] = 100 * causal * tokens_per_s / gpu.flops
            record["mfu_full"] = 100 * full * tokens_per_s / gpu.flops
    if work.ceilings:
        record["percent"] = 100 * causal * tokens_per_s / work.ceilings.matmul_flops_per_s
    return record


def bench_ours(work) -> None:
    model = random_model(work.shape.config, work.device, work.dtype)
    _bench(work, "ours", model, model.loss, model.loss)


def bench_transformers(work) -> None:
    hf = causal_lm(random_model(work.shape.config, work.device, work.dtype)).train()
    model = _HuggingFaceLoss(hf, work.shape)
    _bench(work, "transformers + SDPA + torch.compile", model, model, model.eager)

"""Phi: the model, built on the front door of xiangxin_kernels, with fused weights."""

import torch
from torch import Tensor, nn
from xiangxin_kernels import (
    decode_block,
    decode_head,
    document_bounds,
    layer_norm,
    linear,
    linear_cross_entropy,
    parallel_block,
    prepack,
)

from .config import PhiConfig
from .errors import InputError
from .kv_cache import KVCache

# What `dtype=None` means. On a CPU too: decoding reads half of fp32's bytes and was measured faster, prefill is on par.
DEFAULT_DTYPE = torch.bfloat16


def refuse_fp16(dtype: torch.dtype) -> None:
    """Raises InputError for fp16, whose range (65,504) the attention scores of trained Phi models leave."""
    if dtype == torch.float16:
        raise InputError("Phi: expected bf16 or fp32 to compute in, got fp16, in which Phi's attention overflows")


class Block(nn.Module):
    """The fused weights of one layer; `parallel_block` tells their layout."""

    def __init__(self, config: PhiConfig, device=None, dtype=None):
        super().__init__()
        C, F = config.channels, config.mlp_hidden
        self.heads, self.eps = config.heads, config.eps

        def empty(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.ln_w, self.ln_b = empty(C), empty(C)
        self.w_in, self.b_in = empty(3 * C + F, C), empty(3 * C + F)
        self.w_out, self.b_out = empty(C, C + F), empty(2, C)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bounds=None, cache=None, q_start: int = 0) -> Tensor:
        return parallel_block(
            x, self.ln_w, self.ln_b, self.w_in, self.b_in, self.w_out, self.b_out, cos, sin,
            heads=self.heads, eps=self.eps, segment_ids=bounds, cache=cache, q_start=q_start,
        )  # fmt: skip

    def decode(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor], positions: Tensor, slots=None
    ) -> Tensor:
        return decode_block(
            x, self.ln_w, self.ln_b, self.w_in, self.b_in, self.w_out, self.b_out, cos, sin, *cache, positions,
            heads=self.heads, eps=self.eps, slots=slots,
        )  # fmt: skip


class Phi(nn.Module):
    """Phi-2's architecture. Weights are uninitialised until `init_weights` or a checkpoint fills them."""

    def __init__(self, config: PhiConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        V, C = config.vocab, config.channels

        def empty(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.embed = empty(V, C)
        self.blocks = nn.ModuleList(Block(config, device, dtype) for _ in range(config.layers))
        self.ln_w, self.ln_b = empty(C), empty(C)
        self.head_w = self.embed if config.tied_head else empty(V, C)
        self.head_b = empty(V)
        self._rotary: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def init_weights(self, seed: int = 0) -> "Phi":
        """Normal(0, init_std) matrices, zero biases, unit LayerNorms; the same for a seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("ln_w"):
                nn.init.ones_(parameter)
            elif name.rsplit(".")[-1] in ("ln_b", "b_in", "b_out", "head_b"):
                nn.init.zeros_(parameter)
            else:
                values = torch.empty(parameter.shape).normal_(0, self.config.init_std, generator=generator)
                parameter.data.copy_(values)
        return self

    def prepack(self) -> "Phi":
        """Lays the weights out anew, one at a time, where this device then decodes faster; their values stay.

        On a CPU bf16 matrices become column blocks [N/80, K, 80] or [N/64, K, 64]: parameters as before, in another
        shape. Where it multiplies bf16 they become mkldnn tensors: new parameters, whose losses and gradients torch
        knows, and `save_pretrained`; optimizers, casts and deepcopy do not.
        """
        owners = [(block, name) for block in self.blocks for name in ("w_in", "w_out")]
        for module, name in owners if self.config.tied_head else [*owners, (self, "head_w")]:
            weight = getattr(module, name)
            if not isinstance(weight, nn.Parameter):
                setattr(module, name, prepack(weight))
            elif (packed := prepack(weight.data)).is_mkldnn:  # which cannot become the data of a plain tensor
                setattr(module, name, nn.Parameter(packed, requires_grad=weight.requires_grad))
            else:
                weight.data = packed
        return self

    def rotary(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin [context, R/2] in fp32, from angles in fp64; not buffers of the module, which casts would touch."""
        if device not in self._rotary:
            # Tables born in inference mode could never be saved for a backward.
            with torch.inference_mode(False):
                R = self.config.rotary_dim
                exponents = torch.arange(0, R, 2, dtype=torch.float64, device="cpu") / R
                positions = torch.arange(self.config.context, dtype=torch.float64, device="cpu")
                angles = torch.outer(positions, self.config.rope_theta**-exponents)
                self._rotary[device] = (angles.cos().float().to(device), angles.sin().float().to(device))
        return self._rotary[device]

    def embedded(self, tokens: Tensor, q_start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, T] at positions q_start.. -> x [B, T, C], cos, sin. InputError past the context and in fp16."""
        if q_start + tokens.shape[1] > self.config.context:
            raise InputError(
                f"Phi: expected at most {self.config.context} positions, got {q_start + tokens.shape[1]} tokens"
            )
        device = self.embed.device
        autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        refuse_fp16(torch.get_autocast_dtype(device.type) if autocast else self.embed.dtype)
        return nn.functional.embedding(tokens, self.embed), *self.rotary(device)

    def hidden(self, tokens: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> the final LayerNorm's output [B, T, C]."""
        x, cos, sin = self.embedded(tokens)
        bounds = None if segment_ids is None else document_bounds(segment_ids)
        for block in self.blocks:
            x = block(x, cos, sin, bounds)
        return layer_norm(x, self.ln_w, self.ln_b, self.config.eps)

    def forward(self, tokens: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]."""
        return linear(self.hidden(tokens, segment_ids), self.head_w, self.head_b)

    def loss(
        self, tokens: Tensor, targets: Tensor, segment_ids: Tensor | None = None, *, reduction: str = "mean"
    ) -> Tensor:
        """Cross-entropy of tokens [B, T] against targets [B, T] (already shifted, -100 ignored): mean or sum."""
        return self.head_loss(self.hidden(tokens, segment_ids).flatten(0, 1), targets.flatten(), reduction=reduction)

    def head_loss(self, x: Tensor, targets: Tensor, *, valid_ids: int | None = None, reduction: str) -> Tensor:
        """Cross-entropy of x [N, C], the final LayerNorm's output, against targets [N]: mean, sum or none.

        The softmax is over ids below `valid_ids`, default all.
        """
        if isinstance(self.head_w, Tensor) and self.head_w.dim() == 2 and not self.head_w.is_mkldnn:
            return linear_cross_entropy(
                x, self.head_w[:valid_ids], self.head_b[:valid_ids], targets, reduction=reduction
            )
        logits = linear(x, self.head_w, self.head_b)[:, :valid_ids]
        return nn.functional.cross_entropy(logits.float(), targets, reduction=reduction)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: KVCache, q_start: int = 0) -> Tensor:
        """Runs tokens [B, T] at positions q_start.. through the cache; logits [B, V] of the last of them."""
        x, cos, sin = self.embedded(tokens, q_start)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache=(cache.k[layer], cache.v[layer]), q_start=q_start)
        return decode_head(x[:, -1], self.ln_w, self.ln_b, self.head_w, self.head_b, self.config.eps)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: KVCache, positions: Tensor, slots: Tensor | None = None) -> Tensor:
        """One token per row, tokens [B] at positions [B] of cache rows `slots` [B]; logits [B, V] of what follows.

        Without `slots` row b is the cache's row b. A row's bits depend on that row alone. Positions must lie within the
        context: they are not looked at, since the host would have to wait for them. InputError in fp16.
        """
        x, cos, sin = self.embedded(tokens[:, None])
        x = x[:, 0]
        for layer, block in enumerate(self.blocks):
            x = block.decode(x, cos, sin, (cache.k[layer], cache.v[layer]), positions, slots)
        return decode_head(x, self.ln_w, self.ln_b, self.head_w, self.head_b, self.config.eps)
